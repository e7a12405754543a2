"""Draw tokens from distributions on a device, without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor


def draw(weights: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return one index of `weights` `[V]`, drawn in proportion to them.

    It is the one that `torch.multinomial` draws: the largest quotient of a weight and an exponential draw.
    That function also looks at the weights first, for which the host waits for a GPU twice.

    Args:
        weights: finite, not negative, with a positive sum.
        generator: random generator on their device.
    """
    return (weights / torch.empty_like(weights).exponential_(1, generator=generator)).argmax(-1)
