"""The model card of an exported draft: what it was trained on, how good it is, how to serve it."""

from __future__ import annotations

import json
import shlex
from pathlib import PurePath

from jinja2 import Environment, PackageLoader, StrictUndefined
from transformers import PretrainedConfig

from train.config import RunConfig
from train.draft.kind import DraftKind
from train.export.engines import VERSIONS
from train.runs.changes import flat_settings
from train.runs.figures import CacheFacts, Evaluation, Speculation, SpeculationRun
from train.runs.page import TrainingPage

TEMPLATE = "model_card.md.jinja"


def _line(text: object) -> str:
    """Put a text on one line, without what a terminal or a parser trips over."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def _code(text: object) -> str:
    return f"`{_line(text).replace('`', chr(39))}`"


def _quoted(text: object) -> str:
    """Write a text as a YAML string: JSON's are."""
    return json.dumps(_line(text), ensure_ascii=False)


def _shell(text: object) -> str:
    return shlex.quote(_line(text))


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


_ENVIRONMENT = Environment(
    loader=PackageLoader("train.export", ""),
    undefined=StrictUndefined,
    trim_blocks=True,
    keep_trailing_newline=True,
)
_ENVIRONMENT.filters |= {
    "line": _line,
    "code": _code,
    "quoted": _quoted,
    "shell": _shell,
    "number": _number,
}


def model_card(
    page: TrainingPage,
    *,
    kind: DraftKind,
    shape: PretrainedConfig,
    dtype: str,
    obstacles: dict[str, str],
    unknown: dict[str, str | None],
    evaluation: Evaluation | None,
    speculation: Speculation | None,
    calibrated: bool,
    with_embeddings: bool,
    gguf: str | None = None,
) -> str:
    """Write a draft's `README.md`, with the Hugging Face Hub's YAML front matter.

    Args:
        page: the checkpoint's `training.json`.
        kind: kind of the draft.
        shape: the draft's own config.
        dtype: dtype of the exported weights.
        obstacles: why each engine can't serve the draft; empty where it can.
        unknown: what to say of engines that are not known to serve the target.
        evaluation: held-out figures of `dspark evaluate`, or of training itself.
        speculation: figures of `dspark speculate`.
        calibrated: whether temperatures come along.
        with_embeddings: whether the target's embedding and head come along.
        gguf: name of the GGUF file that comes along.
    """
    progress, trained_on, served = page.progress, page.cache, kind.served(shape)
    cache = evaluation.cache if evaluation else None
    theirs = (trained_on.data.sha256, trained_on.target.weights)
    same = cache is not None and (cache.data_sha256, cache.target_weights) == theirs
    return _ENVIRONMENT.get_template(TEMPLATE).render(
        layers=shape.num_hidden_layers,
        dtype=dtype,
        target=trained_on.target,
        tokenizer=trained_on.tokenizer,
        data=trained_on.data,
        features=trained_on.features,
        sources=", ".join(map(_code, trained_on.data.sources)),
        kind=kind,
        kind_lines=kind.describe(shape),
        layer_ids=shape.target_layer_ids,
        slots=kind.slots(shape),
        served=served,
        vllm_config=json.dumps({"method": served["vllm"]["method"], "model": "DRAFT_DIR", **served["vllm"]}),
        obstacles=obstacles,
        unknown=unknown,
        versions=VERSIONS,
        tags=[e for e, why in obstacles.items() if not why and e in kind.targets and not unknown[e]],
        imported=page.imported and page.imported.name,
        parameters=f"{progress.parameters:,}",
        step=f"{progress.step:,}",
        steps=f"{progress.total_steps:,}",
        tokens=f"{progress.tokens:,}",
        samples=f"{cache.samples:,}" if same else None,
        sample_tokens=f"{cache.tokens:,}" if same else None,
        settings=_settings(page.config),
        version=", ".join(f"{_line(name)} {_line(value)}" for name, value in page.version.items()),
        evaluation=evaluation,
        counts=f", {evaluation.blocks:,} blocks of {evaluation.samples:,}" if evaluation else "",
        other_data=_other_data(cache) if cache and cache.data_sha256 and not same else "",
        live=list(map(_live, speculation.runs)) if speculation else [],
        measured_lengths=[run for run in speculation.runs if run.lengths] if speculation else [],
        live_where=_where(speculation) if speculation else "",
        calibrated=calibrated,
        with_embeddings=with_embeddings,
        gguf=gguf,
    )


def _settings(config: RunConfig) -> dict[str, str]:
    """Return the run's settings by their dotted names, without paths of the machine that trained it."""
    settings = flat_settings(config)
    if settings["draft.init_from"] is not None:
        settings["draft.init_from"] = PurePath(settings["draft.init_from"]).name
    lists = {name: list(value) for name, value in settings.items() if isinstance(value, tuple)}
    return {name: "none" if value is None else _line(value) for name, value in (settings | lists).items()}


def _live(run: SpeculationRun) -> list[str]:
    """Return a row of the table of live decoding."""
    figures = (run.temperature, run.tokens_per_round, run.speedup)
    return [*map(_number, figures), " ".join(map(_number, run.accept_given_prefix)) or "-"]


def _other_data(cache: CacheFacts) -> str:
    """Say whose samples were measured, where they are not of the cache that the draft was trained on."""
    sources = ", ".join(map(_code, cache.sources))
    return f" of another cache ({sources}, data of SHA-256 {_code(cache.data_sha256)})"


def _where(speculation: Speculation) -> str:
    """Say what the figures of live decoding depend on."""
    text = (
        f", {speculation.prompts:,} prompts on {_line(speculation.device)} in {_line(speculation.dtype)}, "
        f"at most {speculation.max_new_tokens:,} new tokens each"
    )
    if speculation.threshold:
        chance = speculation.threshold
        text += f", verifying tokens that are accepted with a probability of at least {chance}"
    return text
