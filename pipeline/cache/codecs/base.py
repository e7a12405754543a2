"""What the writer and the reader ask of a codec, and the arithmetic that several share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# A tensor in a shard: its torch dtype and its shape.
TensorSpec = tuple[torch.dtype, tuple[int, ...]]

# Values worked on at a time: what fits a core's cache on a CPU, and little memory on a GPU.
CPU_CHUNK, GPU_CHUNK = 2**20, 2**25


@dataclass(frozen=True)
class Statistics:
    """Mean and deviation of each channel of one state, `[H]` fp32, by which values are standardised."""

    mean: Tensor
    deviation: Tensor

    def to(self, device: torch.device) -> Statistics:
        return Statistics(self.mean.to(device), self.deviation.to(device))


class Codec(Protocol):
    """How rows of one state are stored."""

    name: str
    standardised: bool
    """Whether it needs the state's statistics."""

    def specs(self, rows: int, width: int) -> dict[str, TensorSpec]:
        """The stored tensors by suffix ("" is the main one) for `rows` rows of `width` values."""

    def encode(self, rows: Tensor, statistics: Statistics | None = None) -> dict[str, Tensor]:
        """Encode finite `[n, H]` of any float dtype into the tensors that `specs` names.

        Raises:
            CacheError: a value that the codec can't hold.
        """

    def decode(self, parts: dict[str, Tensor], out: Tensor, statistics: Statistics | None = None) -> None:
        """Decode the stored tensors of some rows into `out` `[n, H]` bfloat16, which may be strided."""


def bits_per_value(codec: Codec, width: int) -> float:
    """What a value takes on disk, scales included."""
    total = sum(
        dtype.itemsize * shape[0] * (shape[1] if shape[1:] else 1)
        for dtype, shape in codec.specs(1, width).values()
    )
    return 8 * total / width


def chunks(rows: Tensor, width: int) -> Iterator[tuple[slice, Tensor]]:
    """Slices of rows that are worked on at a time, each with the same fp32 memory `[n, width]` to work in."""
    size = max(1, (CPU_CHUNK if rows.device.type == "cpu" else GPU_CHUNK) // width)
    memory = torch.empty(min(size, len(rows)), width, device=rows.device)
    for start in range(0, len(rows), size):
        stop = min(start + size, len(rows))
        yield slice(start, stop), memory[: stop - start]


def standardise(rows: Tensor, statistics: Statistics, out: Tensor) -> Tensor:
    """`(rows - mean) / deviation` in fp32, `[n, H]`, into `out`, which is returned."""
    out.copy_(rows)
    return out.sub_(statistics.mean).div_(statistics.deviation)


def restore(values: Tensor, statistics: Statistics, out: Tensor) -> None:
    """`mean + deviation * values`, in place in fp32, then rounded to bf16 into `out`.

    A product and a sum that round once each, where a fused one would round as the device likes.
    """
    out.copy_(values.mul_(statistics.deviation).add_(statistics.mean))


def peaks(values: Tensor) -> Tensor:
    """The largest absolute value along the last dimension."""
    return values.abs().amax(dim=-1)  # ten times the speed of aminmax on a CPU


def round_up_to_bf16(positive: Tensor) -> Tensor:
    """The smallest bfloat16 that is not below each of some non-negative fp32 values.

    A bfloat16 is the upper half of a float32, so rounding up is adding just less than one unit of that half.
    """
    bits = positive.contiguous().view(torch.int32)
    return ((bits + 0xFFFF) >> 16).to(torch.int16).view(torch.bfloat16)


def scales_for(peaks: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """Scales that map `peaks` to at most `largest`: as stored, and as fp32 divisors (1 for a peak of 0)."""
    stored = round_up_to_bf16(peaks / largest)
    divisors = stored.float()
    return stored, torch.where(divisors == 0, torch.ones_like(divisors), divisors)
