"""Drafts and targets that each engine serves.

To add an engine: add a row to `VERSIONS`, its command to the model card, its rules and its targets to
`draft/<kind>/serving.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PretrainedConfig

from pipeline.errors import UsageError
from train.draft.serving import Rule

Rules = Mapping[str, tuple[Rule, ...]]
"""Rules of a kind of draft, by engine."""
Targets = Mapping[str, frozenset[str]]
"""Targets that serve a kind of draft, by engine."""

VERSIONS = {
    "vllm": "vLLM 0.33.0",
    "sglang": "SGLang 0.5.23",
    "llama.cpp": "llama.cpp of llama-cpp-python 0.3.36",
    "tensorrt-llm": "TensorRT-LLM 1.4.0rc4",
}
"""The versions whose sources the rules are read from."""
# Dtypes that an engine converts on loading, whatever it is told.
DTYPES_REFUSED = {
    ("tensorrt-llm", dtype): "it is known to load no other than bfloat16 unrounded"
    for dtype in ("float16", "float32")
}
# Engines that misread copies of the target's embedding and head beside a draft of all tokens: llama.cpp's
# converter drops the head beside a Markov head, and the server then takes the embedding for it.
EMBEDDINGS_REFUSED = {"llama.cpp": "it has the target's, and may take a copy of the embedding for the head"}


def broken_rules(rules: Rules, config: PretrainedConfig, engine: str) -> list[Rule]:
    """Return the rules of an engine that a draft breaks."""
    return [rule for rule in rules[engine] if not rule.holds(config)]


def check_engine(
    rules: Rules, config: PretrainedConfig, engine: str, dtype: str, *, embeddings: bool = False
) -> None:
    """Check that an engine can serve a draft.

    Args:
        rules: rules of the draft's kind.
        dtype: dtype of the exported weights.
        embeddings: whether the target's embedding and whole head come along.

    Raises:
        UsageError: the engine can't serve the draft; the message has every reason and the remedies.
    """
    broken = broken_rules(rules, config, engine)
    if broken:
        last = config.num_target_layers - 2
        others = [name for name in rules if not broken_rules(rules, config, name)]
        remedies = dict.fromkeys(rule.remedy.format(last=last) for rule in broken if rule.remedy)
        train = f", or train with {' and '.join(remedies)}" if remedies else ""
        raise UsageError(
            f"{engine} can't serve this draft: {_reasons(config, broken)}: "
            f"export --to {' or '.join(reversed(others))}{train}"
        )
    if (engine, dtype) in DTYPES_REFUSED:
        raise UsageError(
            f"{engine} can't serve this draft in {dtype}: {DTYPES_REFUSED[engine, dtype]}: "
            "export --dtype bfloat16"
        )
    if embeddings and engine in EMBEDDINGS_REFUSED:
        raise UsageError(
            f"{engine} can't serve this draft with the target's embedding and head beside it: "
            f"{EMBEDDINGS_REFUSED[engine]}: leave out --with-embeddings"
        )


def obstacle(
    rules: Rules, config: PretrainedConfig, engine: str, dtype: str, *, embeddings: bool = False
) -> str:
    """Return the reasons why an engine can't serve a draft; an empty string if it can.

    Arguments are as of `check_engine`.
    """
    refused = DTYPES_REFUSED.get((engine, dtype))
    found = [
        _reasons(config, broken_rules(rules, config, engine)),
        f"dtype is {dtype}, and {refused}" if refused else "",
        f"the target's head comes along, and {EMBEDDINGS_REFUSED[engine]}"
        if embeddings and engine in EMBEDDINGS_REFUSED
        else "",
    ]
    return "; ".join(filter(None, found))


def unknown_target(targets: Targets, architecture: str, engine: str) -> str | None:
    """Return a warning if an engine's known version serves no draft for a target.

    Args:
        targets: targets of the draft's kind.
        architecture: name of the target's class.

    Returns:
        None if it does, or if the engine's targets are not known.
    """
    if engine not in targets or architecture in targets[engine]:
        return None
    return f"{VERSIONS[engine]} serves no draft for a {architecture} target; a newer version may"


def _reasons(config: PretrainedConfig, broken: list[Rule]) -> str:
    """Return the broken rules of a draft as text, field by field."""
    return "; ".join(f"{r.field} is {getattr(config, r.field, None)}, and {r.reason}" for r in broken)
