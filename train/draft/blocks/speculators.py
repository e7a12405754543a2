"""Fields of the speculators library's config.json that drafters of blocks have in common.

The library's training counts a window from the anchor, engines count it by slot, as runs do. There are two
layouts of a block. If `sample_from_anchor` is true, the anchor drafts the token after it, and a
block drafts as many tokens as it has slots. If not, the anchor drafts nothing, and a block drafts one less.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig, Qwen3Config

from pipeline.errors import RunError
from train.draft.blocks.config import block_export, slides
from train.draft.speculators import library_ids, need, nested_layers, run_ids
from train.draft.vocabulary import draft_vocab_size


def block_layers(config: PretrainedConfig) -> dict[str, Any]:
    """Return `transformer_layer_config` of a draft, with the windows of its layers."""
    values = block_export(config, ("num_target_layers",))
    values.pop("draft_vocab_size", None)  # a field of the outer config
    return values


def block_fields(config: PretrainedConfig, *, sample_from_anchor: bool) -> dict[str, Any]:
    """Return the fields of a draft's config.json that all drafters of blocks have."""
    return {
        "draft_vocab_size": draft_vocab_size(config),
        "target_hidden_size": config.hidden_size,
        "block_size": config.block_size,
        "aux_hidden_state_layer_ids": library_ids(config.target_layer_ids),
        "mask_token_id": config.mask_token_id,
        "sliding_window_non_causal": True,
        "sample_from_anchor": sample_from_anchor,
    }


def released_block(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return what all drafters of blocks have of a config.json, by the names that runs have.

    Args:
        values: values of config.json.
        where: path of config.json, for messages.

    Raises:
        RunError: a field is missing or can't be read, or sliding layers hide a block's later slots.
    """
    found = nested_layers(values, Qwen3Config, where)
    if slides(Qwen3Config.from_dict(dict(found))):
        if values.get("sliding_window_non_causal") is not True:
            raise RunError(
                f"{where} has sliding_attention in layer_types without sliding_window_non_causal = true, so "
                "sliding layers hide a block's later slots from its earlier ones: no run can describe this "
                "draft, import another"
            )
        found["is_causal"] = False
    return found | {
        "block_size": need(values, "block_size", "is 8 to speculators and unknown to other readers", where),
        "mask_token_id": need(values, "mask_token_id", "no reader can do without", where),
        "target_layer_ids": run_ids(values, "aux_hidden_state_layer_ids", where),
    }


def has_no_heads(values: Mapping[str, Any]) -> bool:
    """Return whether a config.json says that there is neither a Markov nor a confidence head."""
    return values.get("markov_rank") == 0 and values.get("enable_confidence_head") is False
