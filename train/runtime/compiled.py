"""Compile functions on first use: loading the compiler takes seconds, which most CPU runs save."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch


def compiles(setting: str, device: torch.device) -> bool:
    """Return whether a value of `train.compile` compiles on a device."""
    return setting == "on" or (setting == "auto" and device.type == "cuda")


@cache
def compiled(function: Callable[..., Any], *, dynamic: bool = True) -> Callable[..., Any]:
    """Return the compiled function. All callers share one compilation.

    Args:
        dynamic: compile once for all shapes; False for those sizes only that a caller marks as dynamic.
    """
    return _compile(function, dynamic=dynamic, any_shape=True)


def compiled_for_training(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function compiled twice: with gradients for one shape, without them for all shapes.

    A training step's shapes never change, and kernels for known sizes are faster. Evaluation has packs of
    many sizes.
    """
    with_gradients = _compile(function, dynamic=False)
    without = _compile(function, dynamic=True, any_shape=True)

    @wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        return (with_gradients if torch.is_grad_enabled() else without)(*arguments, **named)

    return call


def _compile(function: Callable[..., Any], *, dynamic: bool, any_shape: bool = False) -> Callable[..., Any]:
    options = None
    if any_shape:
        from torch._inductor import config

        # It fails to compile when a size is not a number (CantSplit, pytorch/pytorch#186426).
        if hasattr(config.triton, "mix_order_reduction"):
            options = {"triton.mix_order_reduction": False}
    return torch.compile(function, dynamic=dynamic, options=options)
