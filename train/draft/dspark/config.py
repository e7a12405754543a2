"""Build the draft's Hugging Face config from a run's `[draft]` table and the target's config.

This is the only place that maps a run's short names to the names that vLLM and SGLang read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig, Qwen3Config

from pipeline.cache import Manifest
from train.config import DraftConfig
from train.draft.body import DIMENSIONS, SLIDING, mask_token_id, qwen3_body

# Fields that Qwen3's config lacks.
FIELDS = (
    "block_size",
    "num_anchors",
    "mask_token_id",
    "target_layer_ids",
    "num_target_layers",
    "markov_rank",
    "markov_head_type",
    "enable_confidence_head",
    "confidence_head_with_markov",
)
# Slot 0 is the anchor and predicts the token after it; there is no further slot for a bonus token.
DECLARED = {"sample_from_anchor": True, "dspark_bonus_anchor": False}
_SAY_NOTHING_OF_WEIGHTS = ("block_size", "num_anchors")


def weight_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a config that decide what its weights mean."""
    names = [*DIMENSIONS, *(name for name in FIELDS if name not in _SAY_NOTHING_OF_WEIGHTS)]
    if values.get("markov_rank") == 0:
        names.remove("markov_head_type")
    return {name: values[name] for name in names if name in values}


def draft_config(
    draft: DraftConfig,
    target: PretrainedConfig,
    manifest: Manifest,
    layer_ids: tuple[int, ...],
    num_anchors: int = 512,
) -> Qwen3Config:
    """Return the draft's config: Qwen3's body with the target's dimensions, and DSpark's own fields.

    Args:
        draft: the run's `[draft]` table; a setting that is None is taken from the target.
        target: the target's own config.
        manifest: the cache's manifest.
        layer_ids: the captured layers the draft reads.
        num_anchors: N, recorded for code that draws anchors by the config.

    Raises:
        ConfigError: the heads don't fit each other, or there is no valid mask token.
    """
    markov = draft.markov_head != "none"
    return Qwen3Config(
        architectures=["Qwen3DSparkModel"],
        **qwen3_body(draft, target, manifest),
        block_size=draft.block_size,
        num_anchors=num_anchors,
        mask_token_id=mask_token_id(draft, manifest),
        target_layer_ids=list(layer_ids),
        num_target_layers=manifest.identity.target.num_layers,
        markov_rank=draft.markov_rank if markov else 0,
        markov_head_type=draft.markov_head,
        enable_confidence_head=draft.confidence_head,
        confidence_head_with_markov=draft.confidence_with_markov and markov,
    )


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
    return [f"{slots}; {anchor}", *_windows(config), markov, confidence]


def _windows(config: PretrainedConfig) -> list[str]:
    """Return a line on the layers that see only a window; none if there are no such layers."""
    own = [str(i) for i, kind in enumerate(config.layer_types) if kind == SLIDING]
    if not own:
        return []
    which = "every layer" if len(own) == config.num_hidden_layers else f"of the layers {', '.join(own)}"
    return [f"sliding attention, {which}: a slot sees {config.sliding_window} positions, its own included"]
