"""The precision a run computes in."""

from __future__ import annotations

import torch

from pipeline.device import native_bf16


def resolve_precision(device: torch.device, precision: str) -> str:
    """`auto` is bf16 where the device multiplies bf16 matrices in hardware, else fp32."""
    if precision != "auto":
        return precision
    return "bf16" if native_bf16(device) else "fp32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The autocast context of a run. Weights, gradients, logits and losses stay fp32."""
    enabled = resolve_precision(device, precision) == "bf16"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def allow_tf32(allowed: bool) -> None:
    """Whether CUDA's fp32 products may round their operands to TF32, in this process."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
