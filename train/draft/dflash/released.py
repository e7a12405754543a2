"""Translate the config.json of a released DFlash draft (z-lab's layout) into settings of a run."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor
from transformers import Qwen3Config

from pipeline.errors import RunError
from pipeline.text import one_line
from train.draft.blocks.config import slides
from train.draft.dflash.config import ARCHITECTURE
from train.draft.dflash.settings import DFLASH_TABLES
from train.draft.released import check_architecture, check_unquantized

# Fields of `dflash_config` that are read; the first two must be there.
_NESTED = ("target_layer_ids", "mask_token_id", "block_size")
_REQUIRED = _NESTED[:2]
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
NEUTRAL = {
    "attention_sink_bias": False,
    "attention_value_scale": 1,
    "causal": False,
    "conv_kernel_size": 0,
    "final_logit_softcapping": None,
    "input_embedding_scale": 1,
    "output_multiplier": 1,
    "projector_type": None,
    "sample_from_anchor": False,
    "selector_rank": 0,
    "use_swa": False,
}
"""Fields of `dflash_config` that other trainers' drafts may have, with the value that changes nothing."""


def nested_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return `dflash_config` without null values."""
    nested = values.get("dflash_config")
    nested = nested if isinstance(nested, Mapping) else {}
    return {name: value for name, value in nested.items() if value is not None}


def check_released(
    values: Mapping[str, Any],
    where: str,
    *,
    architecture: str = ARCHITECTURE,
    title: str = DFLASH_TABLES.title,
    own: Collection[str] = (),
    scales: Collection[str] = (),
) -> None:
    """Check that a released config describes a draft of this project's kind.

    Args:
        values: values of config.json, without null ones.
        where: path of config.json, for messages.
        architecture: class of a kind that builds on DFlash.
        title: name of such a kind.
        own: fields of `dflash_config` that such a kind needs.
        scales: fields that it may have.

    Raises:
        RunError: the config describes another kind of draft; the message names the field.
    """
    nested = nested_fields(values)
    check_architecture(values, (architecture,), where)
    for name in (*_REQUIRED, *own):
        if name not in nested:
            raise RunError(
                f"{where} has no dflash_config.{name}, so it is not a {title} draft: import another"
            )
    for name, neutral in NEUTRAL.items():
        if name in own or name in scales:
            continue
        if nested.get(name, neutral) != neutral:
            raise RunError(
                f"{where} has dflash_config.{name} = {nested[name]!r}, expected {neutral!r}: no run can "
                "describe this draft, import another"
            )
    if values.get("is_causal"):
        raise RunError(f"{where} has is_causal = true, expected false: import another draft")
    for name in _NESTED:
        if name in values and name in nested and values[name] != nested[name]:
            raise RunError(
                f"{where} has {name} = {values[name]!r} and dflash_config.{name} = {nested[name]!r}; "
                "engines read one or the other: remove the wrong one"
            )
    _check_read_first(values, nested, where)
    if values.get("model_type", "qwen3") != "qwen3":
        raise RunError(
            f"{where} has model_type = {values['model_type']!r}, expected 'qwen3': it is another kind of "
            "draft, import another"
        )
    check_unquantized(values, where)


def _check_read_first(values: Mapping[str, Any], nested: Mapping[str, Any], where: str) -> None:
    """Check the fields that engines read instead of others. Raise RunError if they say something else."""
    name, ids = "eagle_aux_hidden_state_layer_ids", nested["target_layer_ids"]
    # vLLM takes this list first, which counts the embeddings as 0.
    if name in values and (not isinstance(ids, list) or values[name] != [i + 1 for i in ids]):
        raise RunError(
            f"{where} has {name} = {values[name]!r}, which engines read instead of "
            f"dflash_config.target_layer_ids = {ids!r} and one higher: remove the wrong one"
        )
    width, hidden = values.get("target_hidden_size"), values.get("hidden_size")
    if width is not None and width != hidden:
        raise RunError(
            f"{where} has target_hidden_size = {width!r} and hidden_size = {hidden!r}, expected the same: no "
            "run can describe this draft, import another"
        )


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
    nested = nested_fields(values)
    values = {**values, **{name: nested[name] for name in _NESTED if name in nested}}
    try:
        body = Qwen3Config.from_dict(dict(values))
        values |= {name: getattr(body, name) for name in _SETTINGS if hasattr(body, name)}
    except Exception as error:  # transformers raises errors of many kinds for a config
        raise RunError(f"{where} can't be read ({one_line(error)})") from None
    draft = {ours: values[theirs] for theirs, ours in _SETTINGS.items() if theirs in values}
    if slides(body):
        if values.get("is_causal") is not False and nested.get("causal") is not False:
            raise RunError(
                f"{where} has sliding_attention in layer_types without is_causal = false, so engines hide "
                "a block's later slots from its earlier ones: it is another kind of draft, import another"
            )
        draft |= {"layer_types": body.layer_types, "sliding_window": body.sliding_window}
    return draft, values
