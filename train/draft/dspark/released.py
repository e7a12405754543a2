"""Translate the config.json of a released DSpark draft (DeepSpec's layout) into settings of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import Qwen3Config

from pipeline.errors import RunError
from pipeline.text import one_line
from train.draft.blocks.config import slides
from train.draft.dspark.config import DECLARED
from train.draft.released import check_architecture, check_unquantized

_REQUIRED = ("target_layer_ids", "mask_token_id")
# Names in config.json -> names in a run's [draft] table.
_SETTINGS = {
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "block_size": "block_size",
    "target_layer_ids": "target_layer_ids",
    "mask_token_id": "mask_token_id",
    "draft_vocab_size": "draft_vocab_size",
    "enable_confidence_head": "confidence_head",
    "confidence_head_with_markov": "confidence_with_markov",
}
# Engines' defaults for fields that a config lacks (SGLang 0.5.23: dspark_config.py; vLLM 0.33.0: the same).
_DEFAULTS = {"block_size": 7, "markov_rank": 0, "markov_head_type": "vanilla"}
# Values that every draft of this project has. Drafts of other projects may have others.
_FIXED = {"model_type": "qwen3", **DECLARED, "is_causal": False, "dflash_config": None}
# The draft's class in vLLM and in SGLang. Weights of another class mean something else.
ARCHITECTURES = ("Qwen3DSparkModel", "DSparkDraftModel")
# Engines read these, if present, instead of the field that is read here.
_READ_FIRST = (
    "dspark_config",
    "dspark_block_size",
    "dspark_markov_rank",
    "dspark_noise_token_id",
    "dspark_target_layer_ids",
    "eagle_aux_hidden_state_layer_ids",
)


def check_released(values: Mapping[str, Any], where: str) -> None:
    """Check that a released config describes a draft of this project's kind.

    Args:
        values: values of config.json, without null ones.
        where: path of config.json, for messages.

    Raises:
        RunError: the config describes another kind of draft; the message names the field.
    """
    for name in _REQUIRED:
        if name not in values:
            raise RunError(f"{where} has no {name}, so it is not a DSpark draft: import another")
    for name, value in _FIXED.items():
        if name in values and values[name] != value:
            raise RunError(
                f"{where} has {name} = {values[name]!r}, expected {value!r}: it is another kind of draft, "
                "import another"
            )
    for name in _READ_FIRST:
        if name in values:
            raise RunError(
                f"{where} has {name}, which engines read instead of block_size, markov_rank, mask_token_id "
                "or target_layer_ids: move its values to those fields and remove it"
            )
    check_unquantized(values, where)
    check_architecture(values, ARCHITECTURES, where)


def released_settings(
    values: Mapping[str, Any], weights: Mapping[str, Tensor], where: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the `[draft]` settings that describe a released draft, and its config with defaults filled in.

    Args:
        values: values of config.json, checked by `check_released`.
        weights: tensors by name; they decide what the config leaves open.
        where: path of config.json, for messages.

    Raises:
        RunError: the config can't be read.
    """
    values = {**_DEFAULTS, **values}
    try:
        body = Qwen3Config.from_dict(dict(values))
        values |= {name: getattr(body, name) for name in _SETTINGS if hasattr(body, name)}
        rank = int(values["markov_rank"])
    except Exception as error:  # transformers raises errors of many kinds for a config
        reason = one_line(error)
        raise RunError(f"{where} can't be read ({reason})") from None
    draft = {ours: values[theirs] for theirs, ours in _SETTINGS.items() if theirs in values}
    if slides(body):
        if values.get("is_causal") is not False:
            raise RunError(
                f"{where} has sliding_attention in layer_types without is_causal = false, so engines hide "
                "a block's later slots from its earlier ones: it is another kind of draft, import another"
            )
        draft |= {"layer_types": body.layer_types, "sliding_window": body.sliding_window}
    draft["markov_head"] = values["markov_head_type"] if rank else "none"
    if rank:
        draft["markov_rank"] = values["markov_rank"]
    # For fields that the config lacks, vLLM and SGLang differ, so take them from the weights.
    confidence = weights.get("confidence_head.proj.weight")
    wider = confidence is not None and confidence.shape[-1] > body.hidden_size
    draft = {"confidence_head": confidence is not None, "confidence_with_markov": wider} | draft
    if not rank:
        draft["confidence_with_markov"] = False
    return draft, values
