"""Translate the config.json of a released DFlash draft (z-lab's layout) into settings of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers import Qwen3Config

from pipeline.errors import RunError
from pipeline.text import one_line
from train.draft.blocks.config import slides
from train.draft.dflash.config import ARCHITECTURE
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
}
# What a draft of this project never has, in `dflash_config`; other trainers' drafts may have it.
_FOREIGN = (
    "attention_sink_bias",
    "attention_value_scale",
    "conv_kernel_size",
    "input_embedding_scale",
    "output_multiplier",
    "projector_type",
    "sample_from_anchor",
    "selector_rank",
    "use_swa",
)


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    nested = values.get("dflash_config") or {}
    return dict(nested) if isinstance(nested, Mapping) else {}


def check_released(values: Mapping[str, Any], where: str) -> None:
    """Check that a released config describes a draft of this project's kind.

    Args:
        values: values of config.json, without null ones.
        where: path of config.json, for messages.

    Raises:
        RunError: the config describes another kind of draft; the message names the field.
    """
    nested = _nested(values)
    check_architecture(values, (ARCHITECTURE,), where)
    for name in _REQUIRED:
        if name not in nested:
            raise RunError(
                f"{where} has no dflash_config.{name}, so it is not a DFlash draft: import another"
            )
    for name in _FOREIGN:
        if nested.get(name):
            raise RunError(
                f"{where} has dflash_config.{name} = {nested[name]!r}, expected none: no run can describe "
                "this draft, import another"
            )
    if nested.get("causal"):
        raise RunError(f"{where} has dflash_config.causal = true, expected false: import another draft")
    if values.get("model_type", "qwen3") != "qwen3":
        raise RunError(
            f"{where} has model_type = {values['model_type']!r}, expected 'qwen3': it is another kind of "
            "draft, import another"
        )
    check_unquantized(values, where)


def released_settings(
    values: Mapping[str, Any], weights: Mapping[str, Tensor], where: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the `[draft]` settings that describe a released draft, and its config with all fields on top.

    Args:
        values: values of config.json, checked by `check_released`.
        weights: not looked at: the config says all.
        where: path of config.json, for messages.

    Raises:
        RunError: the config can't be read.
    """
    values = {**values, **_nested(values)}
    try:
        body = Qwen3Config.from_dict(dict(values))
        values |= {name: getattr(body, name) for name in _SETTINGS if hasattr(body, name)}
    except Exception as error:  # transformers raises errors of many kinds for a config
        raise RunError(f"{where} can't be read ({one_line(error)})") from None
    draft = {ours: values[theirs] for theirs, ours in _SETTINGS.items() if theirs in values}
    if slides(body):
        draft |= {"layer_types": body.layer_types, "sliding_window": body.sliding_window}
    return draft, values
