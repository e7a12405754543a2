"""A DFlash2 draft in the speculators library's form (models/dflash2 of speculators 0.9.0)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from pipeline.errors import RunError
from train.draft.blocks.speculators import block_fields, block_layers
from train.draft.dflash.speculators import as_dflash
from train.draft.dflash2.config import ARCHITECTURE, OWN
from train.draft.speculators import TYPE, SpeculatorsForm, need

_NAME = "dflash2"


def _fields(config: PretrainedConfig) -> dict[str, Any]:
    own = {name: getattr(config, name) for name in OWN}
    return {**block_fields(config, sample_from_anchor=False), **own}


def _claims(values: Mapping[str, Any]) -> bool:
    return values.get(TYPE) == _NAME


def _released(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    if values.get("sample_from_anchor") is True:
        raise RunError(
            f"{where} has sample_from_anchor = True, expected False: no run can describe a draft with a "
            "selector whose anchor drafts, import another"
        )
    found = as_dflash(values, where, ARCHITECTURE)
    found["dflash_config"] |= {name: need(values, name, "no reader can do without", where) for name in OWN}
    return found


SPECULATORS = SpeculatorsForm(
    name=_NAME,
    architecture=ARCHITECTURE,
    fields=_fields,
    layers=block_layers,
    claims=_claims,
    released=_released,
)
