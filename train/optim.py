"""The optimiser and its schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from train.config import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over what trains; weight decay on matrices only. A group's `lr_scale` multiplies its rate."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = []
    for markov, scale in ((False, 1.0), (True, config.markov_lr_scale)):
        own = [p for name, p in trained if name.startswith("markov_head.") == markov]
        for matrices, decay in ((True, config.weight_decay), (False, 0.0)):
            params = [p for p in own if (p.ndim >= 2) == matrices]
            if params:
                groups.append({"params": params, "weight_decay": decay, "lr_scale": scale})
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)


def learning_rate(step: int, total_steps: int, config: TrainConfig) -> float:
    """The rate of optimiser step `step` (from 0): linear warm-up, then cosine to `min_lr_ratio`."""
    warmup = math.ceil(config.warmup_ratio * total_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(total_steps - 1 - warmup, 1)
    cosine = (1 + math.cos(math.pi * min(progress, 1.0))) / 2
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)
