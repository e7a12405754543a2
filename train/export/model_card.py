"""The model card of an exported draft: what it was trained on, how good it is, how to serve it."""

from __future__ import annotations

import json
import shlex
from pathlib import PurePath
from typing import Any

from jinja2 import Environment, StrictUndefined

from pipeline.cache.manifest import Identity

_TEMPLATE = """\
---
base_model: {{ target.name | quoted }}
library_name: dspark-pipeline
tags:
- dspark
- speculative-decoding
- draft-model
{% for engine, obstacle in obstacles.items() if not obstacle and not unknown[engine] %}
- {{ engine }}
{% endfor %}
---

# A DSpark draft for {{ target.name | line }}

A draft model for speculative decoding with {{ target.name | code }}: it reads that model's hidden states
and drafts {{ config.block_size }} tokens at once, which the model then checks in one forward. It is no
language model on its own.
{{- "" if with_embeddings else " Embedding and head are left out: they are the target's." }}

Speculative decoding is lossless. The target verifies every token, so what it says has the distribution that
it has without a draft, up to rounding; the draft decides only how fast that comes.

## Target

- name: {{ target.name | code }}
- {{ target.architecture | line }}, {{ target.num_layers }} layers, width {{ target.hidden_size }}, vocabulary
  {{ target.vocab_size }}, computed in {{ target.dtype | line }}
- revision: weight files with SHA-256 {{ target.weights | code }}
- tokenizer {{ tokenizer.sha256 | code }}, chat template {{ tokenizer.chat_template_sha256 | code }}

## Draft

- layers: {{ config.num_hidden_layers }}
- {{ parameters }} trained parameters, written as {{ config.dtype }}
- reads the outputs of target layers {{ config.target_layer_ids | join(", ") }}, counted from 0
- block size {{ config.block_size }}, mask token {{ config.mask_token_id }}; the anchor drafts the first token
  (`sample_from_anchor`), and there is no bonus slot
{% if config.markov_rank %}
- {{ config.markov_head_type }} Markov head of rank {{ config.markov_rank }}
{% else %}
- no Markov head
{% endif %}
{% if config.enable_confidence_head %}
- confidence head{{ ", which also sees the Markov embedding" if config.confidence_head_with_markov }}
{% else %}
- no confidence head
{% endif %}

## Training

{% if imported %}
The weights were imported from {{ imported | code }}; what they were trained on is not known here. The data
below are those of the cache that they were imported with.
{% else %}
Offline, from hidden states of the target that were captured once: up to step {{ step }} of {{ steps }}, over
{{ tokens }} tokens, at a peak learning rate of {{ settings["train.lr"] }}.
{% endif %}

- data: {{ sources }}
{% if samples %}
- {{ samples }} samples, {{ sample_tokens }} tokens, held-out ones included
{% endif %}
- its SHA-256 {{ data.sha256 | code }}
{% for name, value in data.settings.items() %}
- {{ name | line }}: {{ value | code }}
{% endfor %}
- stored states: {{ features.context_codec | line }} context, {{ features.last_codec | line }} last hidden
- code: {{ version }}
{% if not imported %}

Every setting:

{% for name, value in settings.items() %}
    {{ name }} = {{ value }}
{% endfor %}
{% endif %}

## Acceptance

{% if evaluation %}
Measured on held-out samples{{ counts }}{{ other_data }}, against the target's own next-token \
distributions. Tokens a
round, the target's own one included: {{ evaluation.tau | number }} when sampling at temperature 1\
{{ ", %s when greedy" | format(evaluation.greedy_tau | number) if evaluation.greedy_tau is defined }}.
{{- " An imported draft may have learned from these samples." if imported }}

| position | acceptance{{ " | given the tokens before it" if evaluation.accept_given_prefix is defined }} |
|---|---{{ "|---" if evaluation.accept_given_prefix is defined }}|
{% for accepted in evaluation.accept_by_position %}
| {{ loop.index }} | {{ accepted | number -}}
{{ " | " ~ (evaluation.accept_given_prefix[loop.index0] | number)
   if evaluation.accept_given_prefix is defined }} |
{% endfor %}
{% else %}
Not measured.
{% endif %}
{% if live %}

In real decoding{{ live_where }}.
The speed-up is over plain decoding of the same prompts by transformers, in the same process; an engine's is
another one.

| temperature | tokens a round | speed-up | acceptance by position, given the tokens before it |
|---|---|---|---|
{% for row in live %}
| {{ row | join(" | ") }} |
{% endfor %}
{% endif %}

## Serve it

`DRAFT_DIR` stands for this directory.
{% if not obstacles.vllm %}

{{ unknown.vllm | line if unknown.vllm else "vLLM 0.33 or later" }}, with its V2 model runner:

    vllm serve {{ target.name | shell }} --speculative-config \\
        '{"method": "dspark", "model": "DRAFT_DIR", "num_speculative_tokens": {{ config.block_size }}, \
"draft_sample_method": "probabilistic"}'

Without `draft_sample_method` it drafts greedily for requests that sample as well, and accepts less of them.
{% else %}

vLLM can't serve it: {{ obstacles.vllm }}.
{% endif %}
{% if not obstacles.sglang %}

{{ unknown.sglang | line if unknown.sglang else "SGLang 0.5.23 or later" }}:

    python -m sglang.launch_server --model-path {{ target.name | shell }} \\
        --speculative-algorithm DSPARK --speculative-draft-model-path DRAFT_DIR
{% if calibrated %}

The confidence head, whose temperatures are in `calibration.json`, can schedule what is verified, once SGLang
knows what a step costs on the machine; without that table it verifies everything. To measure it, start the
command above with `SGLANG_RAGGED_VERIFY_MODE=static SGLANG_DSPARK_ENABLE_SPS_RECORD=1` before it, and run

    python -m sglang.benchmark.dspark_sps_profiler all --base-url http://localhost:30000 \\
        --out SPS.json --no-plot

Then serve with

    SGLANG_RAGGED_VERIFY_MODE=compact python -m sglang.launch_server --model-path {{ target.name | shell }} \\
        --speculative-algorithm DSPARK --speculative-draft-model-path DRAFT_DIR \\
        --speculative-dspark-confidence-sts-path DRAFT_DIR/calibration.json \\
        --speculative-dspark-sps-table-path SPS.json
{% endif %}
{% else %}

SGLang can't serve it: {{ obstacles.sglang }}.
{% endif %}
"""


def _line(text: object) -> str:
    """On one line, with nothing that a terminal or a parser trips over."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def _code(text: object) -> str:
    return f"`{_line(text).replace('`', chr(39))}`"


def _quoted(text: object) -> str:
    """A YAML string: JSON's are."""
    return json.dumps(_line(text), ensure_ascii=False)


def _shell(text: object) -> str:
    return shlex.quote(_line(text))


def _number(value: object) -> str:
    known = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{value:.3f}" if known else "-"


_ENVIRONMENT = Environment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True)
_ENVIRONMENT.filters |= {
    "line": _line,
    "code": _code,
    "quoted": _quoted,
    "shell": _shell,
    "number": _number,
}


def model_card(
    config: dict[str, Any],
    page: dict[str, Any],
    trained_on: Identity,
    *,
    obstacles: dict[str, str],
    unknown: dict[str, str | None],
    evaluation: dict[str, Any] | None,
    speculation: dict[str, Any] | None,
    calibrated: bool,
    with_embeddings: bool,
) -> str:
    """The text of a draft's `README.md`, with the Hugging Face Hub's YAML front matter.

    Args:
        config: the exported `config.json`.
        page: the checkpoint's `training.json`.
        trained_on: the cache's identity.
        obstacles: why `vllm` and `sglang` can't serve the draft; empty where they can.
        unknown: what to say of `vllm` and `sglang` where they are not known to serve the target.
        evaluation: held-out figures of `dspark evaluate`, or of training itself.
        speculation: figures of real decoding, of `dspark speculate`.
        calibrated: whether temperatures come along.
        with_embeddings: whether the target's embedding and head come along.
    """
    progress = page["progress"]
    evaluation, speculation = evaluation or {}, speculation or {}
    cache = evaluation.get("cache") or {}
    theirs = (trained_on.data.sha256, trained_on.target.weights)
    same = (cache.get("data_sha256"), cache.get("target_weights")) == theirs
    return _ENVIRONMENT.from_string(_TEMPLATE).render(
        config=config,
        target=trained_on.target,
        tokenizer=trained_on.tokenizer,
        data=trained_on.data,
        features=trained_on.features,
        sources=", ".join(map(_code, trained_on.data.sources)),
        obstacles=obstacles,
        unknown=unknown,
        imported=(page.get("imported") or {}).get("name"),
        parameters=f"{progress['parameters']:,}",
        step=f"{progress['step']:,}",
        steps=f"{progress['total_steps']:,}",
        tokens=f"{progress['tokens']:,}",
        samples=_count(cache.get("samples")) if same else None,
        sample_tokens=_count(cache.get("tokens")) if same else None,
        settings=dict(_settings(page["config"])),
        version=", ".join(f"{_line(name)} {_line(value)}" for name, value in page["version"].items()),
        evaluation=evaluation,
        counts=_counts(evaluation),
        other_data="" if same or "data_sha256" not in cache else _other_data(cache),
        live=[_live(run) for run in speculation.get("runs") or []],
        live_where=_where(speculation),
        calibrated=calibrated,
        with_embeddings=with_embeddings,
    )


def _settings(config: dict[str, Any]) -> list[tuple[str, str]]:
    """The run's settings by their dotted names, without the paths of the machine that trained it."""
    rows = []
    for table, values in config.items():
        for name, value in values.items():
            if name == "init_from" and value is not None:
                value = PurePath(value).name
            rows.append((f"{table}.{name}", "none" if value is None else _line(value)))
    return rows


def _count(value: object) -> str | None:
    return f"{value:,}" if isinstance(value, int) else None


def _counts(evaluation: dict[str, Any]) -> str:
    blocks, samples = _count(evaluation.get("blocks")), _count(evaluation.get("samples"))
    return f", {blocks} blocks of {samples}" if blocks and samples else ""


def _live(run: dict[str, Any]) -> list[str]:
    positions = run.get("accept_given_prefix") or []
    figures = [run.get(name) for name in ("temperature", "tokens_per_round", "speedup")]
    return [*map(_number, figures), " ".join(map(_number, positions)) or "-"]


def _other_data(cache: dict[str, Any]) -> str:
    """Whose samples were measured, where they are not of the cache that the draft was trained on."""
    sources = ", ".join(map(_code, cache["sources"]))
    return f" of another cache ({sources}, data of SHA-256 {_code(cache['data_sha256'])})"


def _where(speculation: dict[str, Any]) -> str:
    """What the figures of real decoding depend on."""
    prompts, limit, threshold = (speculation.get(name) for name in ("prompts", "max_new_tokens", "threshold"))
    number = _count(len(prompts) if isinstance(prompts, list) else prompts)
    device, dtype = speculation.get("device"), speculation.get("dtype")
    parts = [
        number and f", {number} prompts",
        device and f" on {_line(device)}",
        dtype and f" in {_line(dtype)}",
        limit and f", at most {_count(limit)} new tokens each",
        threshold and f", verifying tokens that are accepted with a probability of at least {threshold}",
    ]
    return "".join(filter(None, parts))
