"""The interface of a codec, and arithmetic that several codecs share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from pipeline.lazy import LazyModule

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = LazyModule("torch")  # `--help` reads the codecs' names and must not wait for torch

# A tensor in a shard: its dtype and its shape.
TensorSpec = tuple["torch.dtype", tuple[int, ...]]

# Values per chunk. The CPU's fit the cache of a core; the GPU's take little of its memory.
CPU_CHUNK, GPU_CHUNK = 2**20, 2**25


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of each channel of one state, `[H]` fp32."""

    mean: Tensor
    deviation: Tensor

    def to(self, device: torch.device) -> Statistics:
        return Statistics(self.mean.to(device), self.deviation.to(device))


class Codec(Protocol):
    """A way to store the rows of one state."""

    name: str
    standardised: bool
    """True if it encodes standardised values, and so needs the state's statistics."""
    order: int
    """Rank by precision: of two codecs, the one of higher order loses less of a state. Unique per codec."""
    for_last: bool
    """True if it is precise enough for last hidden states, which the teacher's logits are computed from."""

    def specs(self, rows: int, width: int) -> dict[str, TensorSpec]:
        """Return the stored tensors by suffix ("" is the main one) for `rows` rows of `width` values."""

    def encode(self, rows: Tensor, statistics: Statistics | None = None) -> dict[str, Tensor]:
        """Encode finite `[n, H]` of any float dtype into the tensors that `specs` names.

        Raises:
            CacheError: a value that the codec can't hold.
        """

    def decode(self, parts: dict[str, Tensor], out: Tensor, statistics: Statistics | None = None) -> None:
        """Decode the stored tensors of `n` rows into `out` `[n, H]` bfloat16, which may be strided."""

    def row_bytes(self, width: int) -> int:
        """Return the bytes of one stored row of `width` values, scales included."""
        return sum(dtype.itemsize * math.prod(shape) for dtype, shape in self.specs(1, width).values())

    def bits(self, width: int) -> float:
        """Return the bits per value of a stored row of `width` values, scales included."""
        return 8 * self.row_bytes(width) / width


def bits_per_value(codec: Codec, width: int) -> float:
    """Return the bits per value of a stored row of `width` values, scales included."""
    return codec.bits(width)


def chunks(rows: Tensor, width: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices that cover `rows`, each with fp32 memory `[n, width]` to work in, the same for all."""
    size = max(1, (CPU_CHUNK if rows.device.type == "cpu" else GPU_CHUNK) // width)
    memory = torch.empty(min(size, len(rows)), width, device=rows.device)
    for start in range(0, len(rows), size):
        stop = min(start + size, len(rows))
        yield slice(start, stop), memory[: stop - start]


def standardise(rows: Tensor, statistics: Statistics, out: Tensor) -> Tensor:
    """Write `(rows - mean) / deviation`, computed in fp32, into `out` `[n, H]` and return it."""
    out.copy_(rows)
    return out.sub_(statistics.mean).div_(statistics.deviation)


def restore(values: Tensor, statistics: Statistics, out: Tensor) -> None:
    """Compute `values * deviation + mean` in place in fp32, then round it to bf16 into `out`.

    Product and sum round once each. A fused operation would round differently on different devices.
    """
    out.copy_(values.mul_(statistics.deviation).add_(statistics.mean))


def peaks(values: Tensor) -> Tensor:
    """Return the largest absolute value along the last dimension."""
    return values.abs().amax(dim=-1)  # ten times as fast as aminmax on a CPU


def round_up_to_bf16(positive: Tensor) -> Tensor:
    """Round non-negative fp32 values up: each to the least bfloat16 not below it.

    A bfloat16 is the upper half of a float32. Adding 0xFFFF, just less than one unit of that half, rounds up.
    """
    bits = positive.contiguous().view(torch.int32)
    return ((bits + 0xFFFF) >> 16).to(torch.int16).view(torch.bfloat16)


def scales_for(peaks: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """Return scales that map `peaks` to at most `largest`: as stored, and as fp32 divisors (1 for 0)."""
    stored = round_up_to_bf16(peaks / largest)
    divisors = stored.float()
    return stored, torch.where(divisors == 0, torch.ones_like(divisors), divisors)
