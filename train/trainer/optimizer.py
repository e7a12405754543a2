"""The optimisers and their schedule."""

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
    """Raises ConfigError when torch lacks the optimiser."""
    if config.optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        raise ConfigError(
            f'train.optimizer = "muon" needs torch 2.9 or newer, this is {torch.__version__}: update it, or '
            'take "adamw"'
        )


def build_optimizers(
    model: nn.Module, config: TrainConfig, lr_scales: Mapping[str, float] | None = None
) -> list[Optimizer]:
    """Build the optimisers over what trains. A group's `lr_scale` multiplies its rate.

    AdamW takes everything, with weight decay on matrices only; or Muon (Jordan et al. 2024) the matrices of
    `fc` and the layers, with updates scaled to the size of AdamW's (Liu et al. 2025, arXiv 2502.16982), so
    that one rate serves both.

    Args:
        lr_scales: by the prefix of parameters' names; all others have 1.
    """
    scales = lr_scales or {}
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizers: list[Optimizer] = []
    if config.optimizer == "muon":
        own = [(n, p) for n, p in trained if p.ndim == 2 and n.startswith(("fc.", "layers."))]
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
            params = [p for p in own if (p.ndim >= 2) == matrices]
            if params:
                groups.append({"params": params, "weight_decay": decay, "lr_scale": scale})
    betas = (config.beta1, config.beta2)
    return [*optimizers, torch.optim.AdamW(groups, lr=config.lr, betas=betas, fused=True)]


def set_learning_rate(optimizers: Sequence[Optimizer], lr: float) -> None:
    """Give every group its rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]


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
            Where gradients are means over ranks, this is a mean too.

    Returns:
        The norm before clipping, of all ranks' parts together.
    """
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    weight = positive(weight)
    norm = whole(torch.nn.utils.get_total_norm(gradients)) / weight
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0) / weight
    torch._foreach_mul_([own_part(gradient) for gradient in gradients], scale)
    return norm
