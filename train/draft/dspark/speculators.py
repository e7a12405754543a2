"""A DSpark draft in the speculators library's form (models/dspark of speculators 0.9.0)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

from pipeline.errors import RunError
from train.draft.blocks.speculators import block_fields, block_layers, has_no_heads, released_block
from train.draft.dspark.config import DECLARED
from train.draft.dspark.released import ARCHITECTURES
from train.draft.speculators import TYPE, SpeculatorsForm, need

_NAME, _BARE = "dspark", "dflash"
# Without one of these the weights decide: readers' own assumptions differ.
_HEADS = ("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov")


def _fields(config: PretrainedConfig) -> dict[str, Any]:
    return {
        **block_fields(config, sample_from_anchor=True),
        "markov_rank": config.markov_rank,
        "markov_head_type": config.markov_head_type if config.markov_rank else "vanilla",
        "enable_confidence_head": config.enable_confidence_head,
        "confidence_head_with_markov": config.confidence_head_with_markov,
    }


def _claims(values: Mapping[str, Any]) -> bool:
    """Claim DSpark, and blocks without heads whose anchor drafts."""
    if values.get(TYPE) == _BARE:
        return values.get("sample_from_anchor") is True
    fills = values.get("sample_from_anchor") is False and has_no_heads(values)
    return values.get(TYPE) == _NAME and not fills


def _released(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    readers = "is true to speculators and false to vLLM"
    if need(values, "sample_from_anchor", readers, where) is not True:
        raise RunError(
            f"{where} has sample_from_anchor = {values['sample_from_anchor']!r} beside a Markov or a "
            "confidence head, expected True: no run can describe a draft with heads whose anchor drafts "
            "nothing, import another"
        )
    heads = {name: values[name] for name in _HEADS if values.get(name) is not None}
    if values[TYPE] == _BARE:
        heads = {"markov_rank": 0, "enable_confidence_head": False}
    return {"architectures": [ARCHITECTURES[0]], **released_block(values, where), **heads, **DECLARED}


SPECULATORS = SpeculatorsForm(
    name=_NAME,
    architecture="DSparkDraftModel",
    fields=_fields,
    layers=block_layers,
    claims=_claims,
    released=_released,
)
