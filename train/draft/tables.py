"""Settings of a kind of draft, without its classes: reading a config needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from train.config import DraftConfig, LossConfig


def nothing_implied(_varied: Collection[str], _draft: Mapping[str, Any]) -> tuple[str, ...]:
    """Return no settings."""
    return ()


SEARCHED = ("train.lr=1e-4..1e-2", "train.warmup_ratio=0.01..0.2", "train.weight_decay=0..0.3")


@dataclass(frozen=True, kw_only=True)
class KindTables:
    """Tables of a kind of draft."""

    name: str
    """Name of the kind in `draft.kind`, and of its tag on the Hugging Face Hub."""
    title: str
    """Name of the kind for people."""
    kind: str
    """Place of its `DraftKind`, as `module:name`."""
    draft: type[DraftConfig]
    """Class of its `[draft]` table."""
    loss: type[LossConfig]
    """Class of its `[loss]` table."""
    published: Mapping[str, str]
    """Published values of settings, by dotted name."""
    implied: Callable[[Collection[str], Mapping[str, Any]], tuple[str, ...]] = nothing_implied
    """Return settings that a point of a grid needs besides its own, as `--set` takes them. Arguments: dotted
    names of the settings that the grid varies, and the point's `[draft]`."""
    searched: tuple[str, ...] = SEARCHED
    """Settings that `dspark tune` searches unless the user names some, as its `--search` takes them. None
    changes the cost of a step: trials are compared after equal numbers of steps."""
