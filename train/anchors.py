"""The documented path of `train.draft.blocks.anchors`."""

from train.draft.blocks.anchors import (
    build_anchor_candidate_mask,
    build_eval_mask,
    create_noise_embed,
    create_position_ids,
    sample_anchor_positions,
)

__all__ = [
    "build_anchor_candidate_mask",
    "build_eval_mask",
    "create_noise_embed",
    "create_position_ids",
    "sample_anchor_positions",
]
