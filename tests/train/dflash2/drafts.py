"""Small DFlash2 drafts for their tests."""

from __future__ import annotations

import torch
from torch import nn
from transformers import Qwen3Config

from tests.train.dflash import drafts as dflash_drafts
from train.draft.dflash2.model import Qwen3DFlash2Model

TAPS, GROUP, RANK, TOP = 2, 4, 6, 11
OWN = {"conv_kernel_size": TAPS, "conv_group_size": GROUP, "selector_rank": RANK, "selector_top_k": TOP}
NEW = ("conv", "candidate_selector")
"""Parts of the names of weights that a DFlash draft lacks."""


def small_config(**overrides) -> Qwen3Config:
    """A draft of 2 layers for 2 captured layers of a target with H = 16 and V = 31."""
    return dflash_drafts.small_config(**OWN | overrides)


def shake(model: nn.Module, seed: int = 0) -> nn.Module:
    """Make the convolutions and the selector do something: as made, they change nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in NEW):
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter += 0.5 * noise.to(parameter.dtype)
    return model


def small_model(seed: int = 0, **overrides) -> Qwen3DFlash2Model:
    """A draft in float64 whose every weight is random, so that no term hides behind a zero."""
    model = Qwen3DFlash2Model(small_config(**overrides)).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return shake(model, seed)
