"""The rows themselves, in a plain number format."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.cache.codecs.base import Statistics, TensorSpec
from pipeline.errors import CacheError


class _Plain:
    """One tensor without a suffix, of one dtype."""

    name: str
    dtype: torch.dtype
    standardised = False

    def specs(self, rows: int, width: int) -> dict[str, TensorSpec]:
        return {"": (self.dtype, (rows, width))}

    def encode(self, rows: Tensor, statistics: Statistics | None = None) -> dict[str, Tensor]:
        return {"": rows.to(self.dtype)}

    def decode(self, parts: dict[str, Tensor], out: Tensor, statistics: Statistics | None = None) -> None:
        out.copy_(parts[""])


@dataclass(frozen=True)
class BFloat16(_Plain):
    """Exact for a bf16 target, and read without a copy."""

    name: str = "bf16"
    dtype: torch.dtype = torch.bfloat16


@dataclass(frozen=True)
class Float32(_Plain):
    """Exact for any target; training reads it as bf16."""

    name: str = "fp32"
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Float16(_Plain):
    """Exact for an fp16 target. Holds no value above 65504, which some targets' activations exceed."""

    name: str = "fp16"
    dtype: torch.dtype = torch.float16

    def encode(self, rows: Tensor, statistics: Statistics | None = None) -> dict[str, Tensor]:
        half = rows.to(torch.float16)
        if not bool(torch.isfinite(half).all()) and bool(torch.isfinite(rows).all()):
            raise CacheError(
                f"a value of {rows.float().abs().max().item():.6g} does not fit fp16, whose largest is "
                "65504: choose another codec, such as bf16 or int8"
            )
        return {"": half}
