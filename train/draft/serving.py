"""Rules of inference engines for drafts, kind by kind in `draft/<kind>/serving.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PretrainedConfig


@dataclass(frozen=True)
class Rule:
    """Something that an engine asks of a draft."""

    field: str
    """Of the draft's config."""
    holds: Callable[[PretrainedConfig], bool]
    reason: str
    """What the engine does instead."""
    remedy: str | None = None
    """The setting of a draft that it serves; `{last}` is the last layer but one."""


def scale_of(config: PretrainedConfig, name: str) -> float:
    """Return a scale that a draft shares with its target; 1 where the config names none."""
    return getattr(config, name, None) or 1.0
