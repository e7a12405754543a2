"""Compute precision of a run."""

from __future__ import annotations

import torch

from pipeline.device import native_bf16


def resolve_precision(device: torch.device, precision: str) -> str:
    """Return `bf16` or `fp32`: `auto` is bf16 if the device multiplies bf16 matrices in hardware."""
    if precision != "auto":
        return precision
    return "bf16" if native_bf16(device) else "fp32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the autocast context of a run. Weights, gradients, logits and losses stay fp32."""
    enabled = resolve_precision(device, precision) == "bf16"
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled)


def allow_tf32(allowed: bool) -> None:
    """Set whether CUDA's fp32 matrix products in this process may round their operands to TF32."""
    torch.set_float32_matmul_precision("high" if allowed else "highest")
