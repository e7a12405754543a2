"""Optimisers, learning rate schedule and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pipeline.errors import ConfigError
from train.config import TrainConfig
from train.losses.slots import positive
from train.runtime.distributed import own_part, whole


def check_optimizer(config: TrainConfig) -> None:
    """Raise ConfigError if torch lacks the optimiser."""
    if config.optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        raise ConfigError(
            f'train.optimizer = "muon" needs torch 2.9 or newer, got {torch.__version__}: update torch, or '
            'set "adamw"'
        )


def build_optimizers(
    model: nn.Module,
    config: TrainConfig,
    lr_scales: Mapping[str, float] | None = None,
    matrices: tuple[str, ...] = (),
) -> list[Optimizer]:
    """Build the optimisers of the trained parameters. A group's `lr_scale` multiplies its learning rate.

    AdamW trains all parameters, with weight decay on matrices only. With `muon`, Muon (Jordan et al. 2024)
    trains some of the matrices instead. Its updates are scaled to the size of AdamW's (Liu et
    al. 2025, arXiv 2502.16982), so that both use the same learning rate.

    Args:
        lr_scales: multiples of the learning rate by prefix of parameter names; other parameters have 1.
        matrices: prefixes of the names of parameters whose matrices Muon trains.
    """
    scales = lr_scales or {}
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizers: list[Optimizer] = []
    if config.optimizer == "muon":
        own = [(n, p) for n, p in trained if p.ndim == 2 and n.startswith(matrices)]
        trained = [pair for pair in trained if pair[0] not in dict(own)]
        group = {"params": [p for _, p in own], "lr_scale": 1.0}
        optimizers.append(
            torch.optim.Muon(
                [group], lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
            )
        )
    groups = []
    for prefix, scale in {"": 1.0, **scales}.items():
        others = () if prefix else tuple(scales)
        own = [p for name, p in trained if name.startswith(prefix) and not name.startswith(others)]
        for matrices, decay in ((True, config.weight_decay), (False, 0.0)):
            params = [p for p in own if (p.ndim == 2) == matrices]
            if params:
                groups.append({"params": params, "weight_decay": decay, "lr_scale": scale})
    betas = (config.beta1, config.beta2)
    return [*optimizers, torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=True)]


def set_learning_rate(optimizers: Sequence[Optimizer], lr: float) -> None:
    """Set the learning rate of every group, scaled by the group's `lr_scale`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]


def learning_rate(step: int, total_steps: int, config: TrainConfig) -> float:
    """Return the learning rate of step `step` (from 0): linear warm-up, then cosine to `min_lr_ratio`."""
    warmup = math.ceil(config.warmup_ratio * total_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(total_steps - 1 - warmup, 1)
    cosine = (1 + math.cos(math.pi * min(progress, 1.0))) / 2
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)


def normalise_gradients(model: nn.Module, weight: Tensor, max_norm: float) -> Tensor:
    """Divide a step's summed gradients by its weight, then clip them to a global norm.

    Dividing here means that a step's weight need not be known before its last micro-batch.

    Args:
        weight: sum of slot weights over the step; if gradients are means over ranks, the mean over ranks of
            that sum. With a weight of 0 the gradients stay zero.
        max_norm: largest norm after clipping.

    Returns:
        The norm before clipping, over all ranks' shards.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    weight = positive(weight)
    norm = whole(torch.nn.utils.get_total_norm(gradients)) / weight
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0) / weight
    torch._foreach_mul_([own_part(gradient) for gradient in gradients], scale)
    return norm
