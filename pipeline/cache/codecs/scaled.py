"""Codecs of eight bits per value and one scale per row."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from pipeline.cache.codecs.base import (
    Codec,
    Statistics,
    TensorSpec,
    chunks,
    peaks,
    restore,
    scales_for,
    standardise,
)
from pipeline.lazy import LazyModule

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")


@dataclass(frozen=True)
class Int8(Codec):
    """Standardised values as `z = scale * code`; the code is rounded to nearest even, from -127 to 127."""

    name: str = "int8"
    standardised: bool = True
    order: int = 40
    for_last: bool = True

    def specs(self, rows: int, width: int) -> dict[str, TensorSpec]:
        return {"": (torch.int8, (rows, width)), "scale": (torch.bfloat16, (rows,))}

    def encode(self, rows: Tensor, statistics: Statistics | None = None) -> dict[str, Tensor]:
        assert statistics is not None
        codes = torch.empty(rows.shape, dtype=torch.int8, device=rows.device)
        scales = torch.empty(len(rows), dtype=torch.bfloat16, device=rows.device)
        for part, memory in chunks(rows, rows.shape[1]):
            z = standardise(rows[part], statistics, memory)
            scales[part], divisors = scales_for(peaks(z), 127.0)
            codes[part] = z.div_(divisors[:, None]).round_()
        return {"": codes, "scale": scales}

    def decode(self, parts: dict[str, Tensor], out: Tensor, statistics: Statistics | None = None) -> None:
        assert statistics is not None
        codes, scales = parts[""], parts["scale"].float()
        for part, memory in chunks(codes, codes.shape[1]):
            memory.copy_(codes[part])
            restore(memory.mul_(scales[part, None]), statistics, out[part])


@cache
def _fp8_pairs(device: torch.device) -> Tensor:
    """Return a table `[65536]` int64: two e4m3 bytes as one number to their two fp32 values, low byte first.

    The two codes that are NaN, which no encoder writes, become 0.
    """
    values = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float().nan_to_num_(0.0)
    numbers = torch.arange(2**16)
    pairs = torch.stack([values[numbers % 256], values[numbers // 256]], dim=1)
    return pairs.view(torch.int64).squeeze(1).to(device)


@dataclass(frozen=True)
class FP8(Codec):
    """Rows in float8 e4m3, scaled so that a row's largest magnitude becomes the format's, 448."""

    name: str = "fp8"
    standardised: bool = False
    order: int = 30
    for_last: bool = True

    def specs(self, rows: int, width: int) -> dict[str, TensorSpec]:
        return {"": (torch.float8_e4m3fn, (rows, width)), "scale": (torch.bfloat16, (rows,))}

    def encode(self, rows: Tensor, statistics: Statistics | None = None) -> dict[str, Tensor]:
        codes = torch.empty(rows.shape, dtype=torch.float8_e4m3fn, device=rows.device)
        scales = torch.empty(len(rows), dtype=torch.bfloat16, device=rows.device)
        for part, memory in chunks(rows, rows.shape[1]):
            memory.copy_(rows[part])
            scales[part], divisors = scales_for(peaks(memory), 448.0)
            codes[part] = memory.div_(divisors[:, None])
        return {"": codes, "scale": scales}

    def decode(self, parts: dict[str, Tensor], out: Tensor, statistics: Statistics | None = None) -> None:
        codes, scales = parts[""].view(torch.uint8), parts["scale"].float()
        pairs = _fp8_pairs(out.device)
        for part, memory in chunks(codes, codes.shape[1]):
            flat = codes[part].flatten()
            if len(flat) % 2 or flat.storage_offset() % 2:
                memory.copy_(codes[part].view(torch.float8_e4m3fn)).nan_to_num_(0.0)
            else:
                numbers = flat.view(torch.int16).to(torch.int32).bitwise_and_(0xFFFF)
                torch.index_select(pairs, 0, numbers, out=memory.view(-1).view(torch.int64))
            out[part] = memory.mul_(scales[part, None])
