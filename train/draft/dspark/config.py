"""Build the draft's Hugging Face config from a run's `[draft]` table and the target's config.

This is the only place that maps a run's short names to the names that vLLM and SGLang read.
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
from train.draft.dspark.settings import DSparkConfig

# Fields that Qwen3's config lacks.
FIELDS = (
    *BLOCK_FIELDS,
    "markov_rank",
    "markov_head_type",
    "enable_confidence_head",
    "confidence_head_with_markov",
)
# Slot 0 is the anchor and predicts the token after it; there is no further slot for a bonus token.
DECLARED = {"sample_from_anchor": True, "dspark_bonus_anchor": False}


def weight_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a config that decide what its weights mean."""
    found = block_weights(values, FIELDS)
    if found.get("markov_rank") == 0:
        found.pop("markov_head_type", None)
    return found


def draft_config(
    draft: DSparkConfig,
    target: PretrainedConfig,
    manifest: Manifest,
    layer_ids: tuple[int, ...],
    num_anchors: int = 512,
) -> Qwen3Config:
    """Return the draft's config: a block drafter's, and DSpark's own fields.

    Arguments and errors are as of `block_config`.
    """
    markov = draft.markov_head != "none"
    return block_config(
        draft,
        target,
        manifest,
        layer_ids,
        num_anchors,
        architectures=["Qwen3DSparkModel"],
        markov_rank=draft.markov_rank if markov else 0,
        markov_head_type=draft.markov_head,
        enable_confidence_head=draft.confidence_head,
        confidence_head_with_markov=draft.confidence_with_markov and markov,
    )


def exported(config: PretrainedConfig) -> dict[str, Any]:
    """Return what an exported config states for engines."""
    return block_export(config, FIELDS) | DECLARED


def served(config: PretrainedConfig) -> dict[str, Any]:
    """Return how engines are told to serve a draft."""
    slots = config.block_size
    # Without draft_sample_method vLLM drafts greedily for requests that sample, and accepts less of them.
    own = {"method": "dspark", "num_speculative_tokens": slots, "draft_sample_method": "probabilistic"}
    trt = {"decoding_type": "DSpark", "max_draft_len": slots}
    return {"vllm": own, "sglang": "DSPARK", "tensorrt-llm": trt}


def describe(config: PretrainedConfig) -> list[str]:
    """Return what a model card tells of the block and the heads."""
    markov, confidence = "no Markov head", "no confidence head"
    if config.markov_rank:
        markov = f"{config.markov_head_type} Markov head of rank {config.markov_rank}"
    if config.enable_confidence_head:
        sees = ", which also sees the Markov embedding" if config.confidence_head_with_markov else ""
        confidence = f"confidence head{sees}"
    slots = f"block size {config.block_size}, mask token {config.mask_token_id}"
    anchor = "the anchor drafts the first token\n  (`sample_from_anchor`), and there is no bonus slot"
    return [f"{slots}; {anchor}", *describe_windows(config), markov, confidence]
