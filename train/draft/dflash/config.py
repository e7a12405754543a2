"""Hugging Face config of a DFlash draft, and the fields that engines read of it.

vLLM 0.33.0 (`model_executor/models/qwen3_dflash.py`) and SGLang 0.5.23 (`srt/models/dflash.py`) read block
and layers from `dflash_config`, whose layer ids count layers from 0 in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig, Qwen3Config

from pipeline.cache import Manifest
from train.draft.blocks.config import (
    BLOCK_FIELDS,
    block_config,
    block_export,
    block_weights,
    describe_windows,
)
from train.draft.dflash.settings import DFlashConfig

# Fields that Qwen3's config lacks.
FIELDS = BLOCK_FIELDS
ARCHITECTURE = "DFlashDraftModel"


def weight_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a config that decide what its weights mean."""
    return block_weights({**values, **values.get("dflash_config", {})}, FIELDS)


def draft_config(
    draft: DFlashConfig,
    target: PretrainedConfig,
    manifest: Manifest,
    layer_ids: tuple[int, ...],
    num_anchors: int = 512,
) -> Qwen3Config:
    """Return the draft's config; arguments and errors are as of `block_config`."""
    return block_config(draft, target, manifest, layer_ids, num_anchors, architectures=[ARCHITECTURE])


def exported(config: PretrainedConfig) -> dict[str, Any]:
    """Return what an exported config states for engines."""
    nested = {
        "mask_token_id": config.mask_token_id,
        "target_layer_ids": list(config.target_layer_ids),
        "block_size": config.block_size,
        "causal": False,
    }
    values = block_export(config, ("block_size", "num_target_layers"))
    return values | {"target_hidden_size": config.hidden_size, "dflash_config": nested}


def served(config: PretrainedConfig) -> dict[str, Any]:
    """Return how engines are told to serve a draft."""
    own = {"method": "dflash", "num_speculative_tokens": config.block_size - 1}
    trt = {"decoding_type": "DFlash", "max_draft_len": config.block_size - 1}
    return {"vllm": own, "sglang": "DFLASH", "tensorrt-llm": trt}


def describe(config: PretrainedConfig) -> list[str]:
    """Return what a model card tells of the block."""
    slots = f"block size {config.block_size}, mask token {config.mask_token_id}"
    anchor = f"the anchor drafts nothing, so a\n  block drafts {config.block_size - 1} tokens"
    return [f"{slots}; {anchor}", *describe_windows(config)]
