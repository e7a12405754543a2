"""Codecs that store rows in a plain number format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.cache.codecs.base import Codec, Statistics, TensorSpec
from pipeline.errors import CacheError
from pipeline.lazy import LazyModule

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")


class _Plain(Codec):
    """One tensor without a suffix, of one dtype."""

    torch_name: str
    """The dtype's name in torch."""
    standardised = False
    for_last = True

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.torch_name)

    def specs(self, rows: int, width: int) -> dict[str, TensorSpec]:
        return {"": (self.dtype, (rows, width))}

    def encode(self, rows: Tensor, statistics: Statistics | None = None) -> dict[str, Tensor]:
        return {"": rows.to(self.dtype)}

    def decode(self, parts: dict[str, Tensor], out: Tensor, statistics: Statistics | None = None) -> None:
        out.copy_(parts[""])


@dataclass(frozen=True)
class BFloat16(_Plain):
    """Exact for a bf16 target; read without a copy."""

    name: str = "bf16"
    torch_name: str = "bfloat16"
    order: int = 50


@dataclass(frozen=True)
class Float32(_Plain):
    """Exact on disk for any target; training reads it as bf16."""

    name: str = "fp32"
    torch_name: str = "float32"
    order: int = 70


@dataclass(frozen=True)
class Float16(_Plain):
    """Exact on disk for an fp16 target. Refuses values that round beyond 65504, which some targets have."""

    name: str = "fp16"
    torch_name: str = "float16"
    order: int = 60

    def encode(self, rows: Tensor, statistics: Statistics | None = None) -> dict[str, Tensor]:
        half = rows.to(torch.float16)
        if not bool(torch.isfinite(half).all()):
            lost = rows[~torch.isfinite(half) & torch.isfinite(rows)]  # infinity in stays infinity
            if len(lost):
                raise CacheError(
                    f"fp16 holds values up to 65504, got {lost.float().abs().max().item():.6g}: "
                    "choose another codec, such as bf16 or int8"
                )
        return {"": half}
