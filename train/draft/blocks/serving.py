"""Keys and tensors that llama.cpp's files of all block drafters have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from train.draft.blocks.config import SLIDING
from train.draft.serving import LLAMA_TENSORS

BLOCK_TENSORS = {
    **LLAMA_TENSORS,
    "hidden_norm": "enc.output_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
}


def block_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a block drafter: block, layers, window and order of a block's slots.

    llama.cpp names a layer's output by the layer that reads it.

    Args:
        values: the exported config, with the fields of the block at its top.
    """
    keys = {
        "block_size": values["block_size"],
        "target_layers": [i + 1 for i in values["target_layer_ids"]],
    }
    if values["use_sliding_window"]:
        keys["attention.sliding_window"] = values["sliding_window"]
        keys["attention.sliding_window_pattern"] = [kind == SLIDING for kind in values["layer_types"]]
    if "mrope_section" in values["rope_parameters"]:  # text has one position in all dimensions
        keys["rope.dimension_sections"] = [values["head_dim"] // 2, 0, 0, 0]
    return keys
