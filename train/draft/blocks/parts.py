"""Parts of a `DraftKind` that are the same for all block drafters."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from transformers import PretrainedConfig

from pipeline.cache import CacheReader
from train.config import TrainConfig
from train.data.sampling import AnchorChoice, random_anchors
from train.draft.blocks.attention import resolve_attention
from train.draft.blocks.model import BlockDraftModel
from train.draft.blocks.ridge import ridge_initialise
from train.draft.blocks.settings import BlockDraftConfig

# Settings that the cache and its target decide where they are not set.
BLOCK_RESOLVED = (
    "target_layer_ids",
    "mask_token_id",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
)
# Parameters whose matrices Muon trains.
BLOCK_MATRICES = ("fc.", "layers.")


def ridge_if_asked(
    model: BlockDraftModel,
    draft: BlockDraftConfig,
    reader: CacheReader,
    samples: np.ndarray,
    by: Callable[[BlockDraftModel, CacheReader, np.ndarray], None] = ridge_initialise,
) -> None:
    """Set initial weights from training samples, if `draft.init` says so.

    Args:
        by: what sets them.
    """
    if draft.init == "ridge":
        by(model, reader, samples)


def check_attention(draft: BlockDraftConfig, config: PretrainedConfig, device: torch.device) -> None:
    """Check that the attention kernel can run on a device. Raise ConfigError if not."""
    if draft.attention != "auto":  # auto can't fail; it is tried when the draft is prepared
        resolve_attention(draft.attention, config, device)


def drawn_blocks(train: TrainConfig, epoch: int) -> AnchorChoice:
    """Return training's choice of anchors in an epoch."""
    return random_anchors(train.anchors_per_batch, train.seed, epoch)


def least_blocks(draft: BlockDraftConfig) -> int:
    """Return the blocks of two tiles of attention: a kernel for one would be compiled by itself."""
    return -(-256 // draft.block_size)
