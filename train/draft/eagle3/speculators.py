"""An EAGLE-3 draft in the speculators library's form (models/eagle3 of speculators 0.9.0)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import LlamaConfig, PretrainedConfig

from pipeline.errors import RunError
from train.draft.eagle3.config import ARCHITECTURE, DECLARED, LAYER_IDS
from train.draft.speculators import (
    TYPE,
    SpeculatorsForm,
    layer_config,
    library_ids,
    need,
    nested_layers,
    run_ids,
    speculative_tokens,
)

_NAME = "eagle3"
# Fields with the value that every reader assumes.
_SAME = {"norm_before_fc": False, "fc_norm": False, "norm_output": False}
# Values of other drafts, which no run can have.
_FIXED = {**DECLARED, "embed_requires_grad": False}


def _fields(config: PretrainedConfig) -> dict[str, Any]:
    return {
        "draft_vocab_size": config.draft_vocab_size,
        "target_hidden_size": config.target_hidden_size,
        LAYER_IDS: library_ids(config.target_layer_ids),
        "fc_norm": config.fc_norm,
        "norm_output": config.norm_output,
        **_FIXED,
    }


def _layers(config: PretrainedConfig) -> dict[str, Any]:
    # vLLM takes fc's width from this field, and from no list at the top.
    return {**layer_config(config), "num_aux_hidden_states": config.num_aux_hidden_states}


def _released(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    need(values, "norm_before_residual", "is false to speculators and true to vLLM", where)
    for name, value in _FIXED.items():
        if values.get(name, value) != value:
            raise RunError(
                f"{where} has {name} = {values[name]!r}, expected {value!r}: no run can describe this draft, "
                "import another"
            )
    layers = nested_layers(values, LlamaConfig, where)
    if "sliding_attention" in layers.get("layer_types", ()):
        raise RunError(
            f"{where} has sliding_attention in layer_types: no run has such a layer in a draft of this kind, "
            "import another"
        )
    return {
        **layers,
        "architectures": [ARCHITECTURE],
        **{name: values.get(name, value) for name, value in (_SAME | DECLARED).items()},
        LAYER_IDS: library_ids(run_ids(values, LAYER_IDS, where)),  # as vLLM counts, one higher than a run
        "ttt_steps": speculative_tokens(values, where),
    }


def _weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("midlayer.", "layers.0.", 1): weight for name, weight in weights.items()}


SPECULATORS = SpeculatorsForm(
    name=_NAME,
    architecture="Eagle3DraftModel",
    fields=_fields,
    layers=_layers,
    claims=lambda values: values.get(TYPE) == _NAME,
    released=_released,
    weights=_weights,
)
