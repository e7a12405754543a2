"""Devices by name."""

from __future__ import annotations

import torch

from pipeline.errors import UsageError


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one, else the CPU. Raises UsageError for a device torch lacks."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"device {name!r} can't be used here ({str(error).splitlines()[0]})") from None
    return device
