"""A DFlash draft in the speculators library's form (models/dflash of speculators 0.9.0)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from train.draft.blocks.speculators import block_fields, block_layers, has_no_heads, released_block
from train.draft.dflash.config import ARCHITECTURE
from train.draft.speculators import TYPE, SpeculatorsForm

_NAME, _WITH_HEADS = "dflash", "dspark"
_NESTED = ("mask_token_id", "target_layer_ids", "block_size")


def _fields(config: PretrainedConfig) -> dict[str, Any]:
    return block_fields(config, sample_from_anchor=False)


def _claims(values: Mapping[str, Any]) -> bool:
    """Claim DFlash, and a draft of the larger form whose anchor drafts nothing and that has no heads."""
    if values.get(TYPE) == _WITH_HEADS:
        return values.get("sample_from_anchor") is False and has_no_heads(values)
    return values.get(TYPE) == _NAME and values.get("sample_from_anchor") is not True


def as_dflash(values: Mapping[str, Any], where: str, architecture: str = ARCHITECTURE) -> dict[str, Any]:
    """Return a config.json as `check_released` takes it; arguments as of `SpeculatorsForm.released`.

    Args:
        architecture: class of a kind that builds on DFlash.
    """
    found = released_block(values, where)
    nested = {name: found.pop(name) for name in _NESTED}
    return {"architectures": [architecture], **found, "dflash_config": {**nested, "causal": False}}


SPECULATORS = SpeculatorsForm(
    name=_NAME,
    architecture="DFlashDraftModel",
    fields=_fields,
    layers=block_layers,
    claims=_claims,
    released=as_dflash,
)
