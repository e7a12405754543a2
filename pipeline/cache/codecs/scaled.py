"""Eight bits a value and one scale a token."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from pipeline.cache.codecs.base import Statistics, TensorSpec, chunks, peaks, restore, scales_for, standardise


@dataclass(frozen=True)
class Int8:
    """Standardised values, symmetric, rounded to even: `z = scale * q`, q from -127 to 127."""

    name: str = "int8"
    standardised: bool = True

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
    """The two fp32 values that two bytes of e4m3 stand for, the low byte's first, as one int64: `[65536]`.

    The two codes that are NaN, which no encoder writes, stand for 0.
    """
    values = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float().nan_to_num_(0.0)
    numbers = torch.arange(2**16)
    pairs = torch.stack([values[numbers % 256], values[numbers // 256]], dim=1)
    return pairs.view(torch.int64).squeeze(1).to(device)


@dataclass(frozen=True)
class FP8:
    """The rows in float8 e4m3, scaled so that a token's largest value is the format's, 448."""

    name: str = "fp8"
    standardised: bool = False

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
