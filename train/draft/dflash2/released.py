"""Translate the config.json of a released DFlash2 draft (z-lab's layout) into settings of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from train.draft.dflash import released as dflash
from train.draft.dflash2.config import ARCHITECTURE, OWN, SCALES
from train.draft.dflash2.settings import DFLASH2_TABLES

_NESTED_SCALES = [name for name, _ in SCALES.values()]


def check_released(values: Mapping[str, Any], where: str) -> None:
    """Check that a released config describes a draft of this project's kind.

    Arguments and errors are as of DFlash's. The target's scales are compared later, with the cache's target.
    """
    dflash.check_released(
        values,
        where,
        architecture=ARCHITECTURE,
        title=DFLASH2_TABLES.title,
        own=OWN,
        scales=_NESTED_SCALES,
    )


def released_settings(
    values: Mapping[str, Any], weights: Mapping[str, Tensor], where: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the `[draft]` settings that describe a released draft, and its config with all fields on top.

    Arguments and errors are as of DFlash's.
    """
    nested = dflash.nested_fields(values)
    draft, values = dflash.released_settings(values, weights, where)
    own = {name: nested[name] for name in OWN}
    scales = {name: nested.get(theirs, neutral) for name, (theirs, neutral) in SCALES.items()}
    return draft | own, {**values, **own, **scales}
