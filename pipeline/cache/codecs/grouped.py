"""Codecs of 3 or 4 bits per value and one scale per 64 channels, on standardised values.

Both store the number of the nearest of a few fixed levels. Encoding rounds a value to bfloat16 and looks its
level up by these 16 bits. Decoding looks up several levels at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import pairwise
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

# Channels per scale.
GROUP = 64
# The 16 levels of NormalFloat4 (Dettmers et al. 2023, QLoRA, appendix E).
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# The 8 levels that quantise a standard normal with the least squared error (Max 1960, table I).
LM3_LEVELS = (-2.152, -1.344, -0.756, -0.2451, 0.2451, 0.756, 1.344, 2.152)
# For groups that a few large values dominate: levels that include 0, with the same outermost one.
LM3_SPARSE_LEVELS = tuple(2.152 * level for level in (-1.0, -0.535, -0.2469, 0.0, 0.1833, 0.382, 0.623, 1.0))

# The encodings tried for a group, in this order: levels, and the factor on the scale at which the group's
# largest value is the outermost level.
_LM3_TRIED = (
    (LM3_LEVELS, 1.0),
    (LM3_LEVELS, 0.85),
    (LM3_LEVELS, 0.72),
    (LM3_LEVELS, 0.6),
    (LM3_SPARSE_LEVELS, 1.0),
)


@cache
def _codes(levels: tuple[float, ...], device: torch.device) -> Tensor:
    """Return the number of the nearest level by a bfloat16's bits, `[65536]` uint8; ties go to the lower."""
    bits = torch.arange(-(2**15), 2**15).to(torch.int16)
    values = bits.view(torch.bfloat16).double()
    middles = [(low + high) / 2 for low, high in pairwise(levels)]
    codes = torch.bucketize(values, torch.tensor(middles, dtype=torch.float64)).to(torch.uint8)
    return torch.cat([codes[2**15 :], codes[: 2**15]]).to(device)  # by the bits as an unsigned number


def _nearest(values: Tensor, levels: tuple[float, ...]) -> Tensor:
    """Return the number of each value's nearest level, uint8, in the shape of `values`."""
    bits = values.to(torch.bfloat16).view(torch.uint16).to(torch.int32)
    return _codes(levels, values.device).index_select(0, bits.flatten()).view(values.shape)


@cache
def _table(levels: tuple[float, ...], count: int, device: torch.device) -> Tensor:
    """Return all combinations of `count` levels, `[len(levels) ** count, count]` fp32.

    A row's number has the numbers of its levels as digits, the lowest digit first.
    """
    each = torch.tensor(levels, dtype=torch.float32)
    numbers = torch.arange(len(levels) ** count)
    columns = [each[numbers // len(levels) ** i % len(levels)] for i in range(count)]
    return torch.stack(columns, dim=1).to(device)


def _padded(width: int, multiple: int) -> int:
    return -(-width // multiple) * multiple


def _grouped(memory: Tensor) -> Tensor:
    """View memory `[n, 64 * groups]` as `[n, groups, 64]`."""
    return memory.unflatten(1, (-1, GROUP))


def _standardised(rows: Tensor, statistics: Statistics, memory: Tensor) -> Tensor:
    """Standardise rows `[n, H]` into groups `[n, groups, 64]`, with zeros after the last value."""
    width = rows.shape[1]
    memory[:, width:] = 0
    standardise(rows, statistics, memory[:, :width])
    return _grouped(memory)


def _look_up(table: Tensor, numbers: Tensor, memory: Tensor) -> None:
    """Write the levels of `numbers` `[n, m]` into the first columns of `memory`, several fp32 per number."""
    if len(numbers) * len(memory[0]) == numbers.numel() * table.itemsize // 4:
        torch.index_select(table, 0, numbers.flatten(), out=memory.view(-1).view(table.dtype))
    else:
        values = table.index_select(0, numbers.flatten()).view(torch.float32).view(len(numbers), -1)
        columns = min(values.shape[1], memory.shape[1])
        memory[:, :columns] = values[:, :columns]


def _restore(memory: Tensor, scales: Tensor, statistics: Statistics, out: Tensor) -> None:
    """Multiply levels by their groups' scales `[n, groups]` and restore `out` `[n, H]`."""
    _grouped(memory).mul_(scales.float()[:, :, None])
    restore(memory[:, : out.shape[1]], statistics, out)


@dataclass(frozen=True)
class NF4(Codec):
    """16 levels, scaled so that a group's largest magnitude is the outermost level; two values per byte."""

    name: str = "nf4"
    standardised: bool = True
    order: int = 20
    for_last: bool = False

    def specs(self, rows: int, width: int) -> dict[str, TensorSpec]:
        return {
            "": (torch.uint8, (rows, _padded(width, 2) // 2)),
            "scale": (torch.bfloat16, (rows, _padded(width, GROUP) // GROUP)),
        }

    def encode(self, rows: Tensor, statistics: Statistics | None = None) -> dict[str, Tensor]:
        assert statistics is not None
        parts = _empty(self.specs(*rows.shape), rows.device)
        for part, memory in chunks(rows, _padded(rows.shape[1], GROUP)):
            groups = _standardised(rows[part], statistics, memory)
            parts["scale"][part], divisors = scales_for(peaks(groups), 1.0)
            codes = _nearest(groups.div_(divisors[:, :, None]).flatten(1), NF4_LEVELS)
            pairs = codes[:, : 2 * parts[""].shape[1]].contiguous().view(torch.int16)
            parts[""][part] = (pairs | pairs >> 4).bitwise_and_(0xFF)
        return parts

    def decode(self, parts: dict[str, Tensor], out: Tensor, statistics: Statistics | None = None) -> None:
        assert statistics is not None
        table = _table(NF4_LEVELS, 2, out.device).view(torch.int64).squeeze(1)  # 8 bytes as one
        codes, scales = parts[""], parts["scale"]
        for part, memory in chunks(codes, _padded(out.shape[1], GROUP)):
            _look_up(table, codes[part].to(torch.int32), memory)
            _restore(memory, scales[part], statistics, out[part])


@dataclass(frozen=True)
class LM3(Codec):
    """8 levels of least squared error for a normal, at the best of several scales per group.

    Three bytes hold 8 values. A group may use other levels instead, which include 0: its scale's sign is set.
    """

    name: str = "lm3"
    standardised: bool = True
    order: int = 10
    for_last: bool = False

    def specs(self, rows: int, width: int) -> dict[str, TensorSpec]:
        return {
            "": (torch.uint8, (rows, _padded(width, 8) // 8 * 3)),
            "scale": (torch.bfloat16, (rows, _padded(width, GROUP) // GROUP)),
        }

    def encode(self, rows: Tensor, statistics: Statistics | None = None) -> dict[str, Tensor]:
        assert statistics is not None
        parts = _empty(self.specs(*rows.shape), rows.device)
        for part, memory in chunks(rows, _padded(rows.shape[1], GROUP)):
            codes, parts["scale"][part] = self._best(_standardised(rows[part], statistics, memory))
            eights = codes.flatten(1)[:, : parts[""].shape[1] // 3 * 8].unflatten(1, (-1, 8)).to(torch.int32)
            packed = eights[..., 0]
            for i in range(1, 8):
                packed = packed | eights[..., i] << 3 * i
            three = torch.stack([packed, packed >> 8, packed >> 16], dim=2).bitwise_and_(0xFF)
            parts[""][part] = three.flatten(1)
        return parts

    def _best(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Return the codes `[n, groups, 64]` and stored scales `[n, groups]` of least squared error."""
        outermost = peaks(groups) / LM3_LEVELS[-1]
        best = []
        for levels, multiple in _LM3_TRIED:
            stored, divisors = scales_for(outermost * multiple, 1.0)
            codes = _nearest(groups / divisors[:, :, None], levels)
            table = _table(levels, 1, groups.device).flatten()
            values = table.index_select(0, codes.flatten().to(torch.int32)).view(groups.shape)
            error = values.mul_(divisors[:, :, None]).sub_(groups).square_().sum(dim=2)
            stored = stored if levels is LM3_LEVELS else -stored
            if best:
                better = error < best[0]
                error = torch.where(better, error, best[0])
                codes = torch.where(better[:, :, None], codes, best[1])
                stored = torch.where(better, stored, best[2])
            best = [error, codes, stored]
        return best[1], best[2]

    def decode(self, parts: dict[str, Tensor], out: Tensor, statistics: Statistics | None = None) -> None:
        assert statistics is not None
        tables = [_table(levels, 4, out.device) for levels in (LM3_LEVELS, LM3_SPARSE_LEVELS)]
        table = torch.cat(tables).view(torch.complex128).squeeze(1)  # 16 bytes as one
        codes, scales = parts[""], parts["scale"]
        for part, memory in chunks(codes, _padded(out.shape[1], GROUP)):
            low, middle, high = codes[part].to(torch.int32).unflatten(1, (-1, 3)).unbind(2)
            twelves = torch.stack([low | (middle & 15) << 8, middle >> 4 | high << 4], dim=2)
            numbers = twelves.flatten(1)
            # A number stands for four values, so a group has sixteen.
            sparse = torch.signbit(scales[part]).to(torch.int32).mul_(8**4)
            numbers += sparse.repeat_interleave(GROUP // 4, dim=1)[:, : numbers.shape[1]]
            _look_up(table, numbers, memory)
            _restore(memory, scales[part].abs(), statistics, out[part])


def _empty(specs: dict[str, TensorSpec], device: torch.device) -> dict[str, Tensor]:
    return {name: torch.empty(shape, dtype=dtype, device=device) for name, (dtype, shape) in specs.items()}
