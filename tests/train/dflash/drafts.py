"""Small DFlash drafts for their tests."""

from __future__ import annotations

import torch
from transformers import Qwen3Config

from tests.train import drafts
from train.draft.dflash.model import Qwen3DFlashModel

BLOCK = 4  # the anchor and three slots
# Documents that end in the middle of an answer, so that a block could run on into the next one.
MASKS = [[0, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1], [0, 0, 1, 1], [1, 1, 1, 1, 1, 1, 1]]
# Blocks that are whole, that end with an answer, and that end with their document.
ANCHORS = [[1, 5], [1, 4], [2], [0, 2, 5]]


def small_config(**overrides) -> Qwen3Config:
    """A draft of 2 layers for 2 captured layers of a target with H = 16 and V = 31."""
    heads = {"markov_rank": 0, "markov_head_type": "none", "enable_confidence_head": False}
    heads["confidence_head_with_markov"] = False
    return drafts.small_config(**{"block_size": BLOCK, **heads, **overrides})


def small_model(seed: int = 0, **overrides) -> Qwen3DFlashModel:
    """A draft in float64 whose every weight is random, so that no term hides behind a zero."""
    model = Qwen3DFlashModel(small_config(**overrides)).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model
