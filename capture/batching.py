"""The capture's plan: which samples share a batch, and which batches make a shard.

Samples of similar length share a batch, so that little is computed on padding: they are sorted by length
inside windows of a few thousand, longest first, and cut by a budget of tokens. The plan is a pure function
of the lengths, so every process, now or after a crash, works on the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.cache.index import plan_shards
from pipeline.rope import RopeLengths

# Samples sorted together. A larger window pads less and spreads a shard's samples over more of the data.
WINDOW_SAMPLES = 4096


@dataclass(frozen=True, eq=False)
class CapturePlan:
    """Samples in the order of the cache, cut into batches, and those into shards."""

    order: np.ndarray
    """`[n]`: the data's number of the cache's i-th sample."""
    batches: list[range]
    """The cache's samples of each batch."""
    shard_batches: list[range]
    """The batches of each shard."""
    padded_tokens: int
    """Tokens that the target computes: each batch's rows times its longest sample, summed."""
    tokens: int
    """Tokens of all samples, without padding."""

    @property
    def shards(self) -> list[range]:
        """Ranges of the cache's samples, one per shard."""
        return [range(self.batches[b[0]].start, self.batches[b[-1]].stop) for b in self.shard_batches]

    @property
    def padding(self) -> float:
        """Fraction of the computed tokens that is padding."""
        return 1 - self.tokens / self.padded_tokens

    def batches_of(self, shard: int) -> Iterator[range]:
        """Yield the cache's samples of each batch of a shard."""
        return (self.batches[b] for b in self.shard_batches[shard])


def plan_capture(
    lengths: np.ndarray, batch_tokens: int, shard_tokens: int, rope: RopeLengths | None = None
) -> CapturePlan:
    """Plan batches and shards.

    Args:
        lengths: tokens of each sample of the data, `[n]`.
        batch_tokens: maximum of a batch's rows times its longest sample. A longer sample is its own batch.
        shard_tokens: maximum tokens per shard. A longer sample is its own shard.
        rope: lengths between which the target's RoPE changes; samples on two sides share no batch.
    """
    order = np.concatenate(
        [
            start + np.argsort(-lengths[start : start + WINDOW_SAMPLES].astype(np.int64), kind="stable")
            for start in range(0, len(lengths), WINDOW_SAMPLES)
        ]
        or [np.empty(0, np.int64)]
    )
    ordered = lengths[order].tolist()
    groups = (rope or RopeLengths()).groups(lengths[order])
    batches: list[range] = []
    sums: list[int] = []
    for start in range(0, len(ordered), WINDOW_SAMPLES):
        stop = min(start + WINDOW_SAMPLES, len(ordered))
        while start < stop:
            longest = tokens = ordered[start]
            end = start + 1
            while (
                end < stop
                and (end + 1 - start) * longest <= batch_tokens
                and tokens + ordered[end] <= shard_tokens
                and groups[end] == groups[start]
            ):
                tokens += ordered[end]
                end += 1
            batches.append(range(start, end))
            sums.append(tokens)
            start = end
    padded = sum(ordered[batch.start] * len(batch) for batch in batches)
    return CapturePlan(order, batches, plan_shards(sums, shard_tokens), padded, sum(sums))
