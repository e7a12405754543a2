"""Rule of an inference engine for drafts. Each kind has its rules in `draft/<kind>/serving.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PretrainedConfig


@dataclass(frozen=True)
class Rule:
    """A requirement of an engine on a draft."""

    field: str
    """Field of the draft's config that breaks the rule."""
    holds: Callable[[PretrainedConfig], bool]
    reason: str
    """Reason why the engine can't serve other values."""
    remedy: str | None = None
    """Setting of a draft that the engine serves; `{last}` stands for the last layer but one."""


def scale_of(config: PretrainedConfig, name: str) -> float:
    """Return a scale that a draft shares with its target; 1 if the config has none."""
    return getattr(config, name, None) or 1.0


WHOLE_VOCABULARY = Rule(
    "draft_vocab_size",
    lambda c: getattr(c, "draft_vocab_size", None) in (None, c.vocab_size),
    "its drafts of blocks draft all of the target's tokens",
    "draft.draft_vocab_size not set",
)
