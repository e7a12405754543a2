"""The optimiser and its schedule."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from train.config import TrainConfig
from train.losses import positive


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


def normalise_gradients(model: nn.Module, weight: Tensor, max_norm: float) -> Tensor:
    """Divide a step's summed gradients by its weight, then clip them to a global norm.

    So nobody needs to know the weight of a step before its last micro-batch was drafted.

    Args:
        weight: the sum of slot weights over the step; a step without any leaves the gradients zero.

    Returns:
        The norm before clipping.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    weight = positive(weight)
    norm = torch.nn.utils.get_total_norm(gradients) / weight
    torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0) / weight)
    return norm
