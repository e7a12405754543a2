"""The capture's plan: which samples share a batch, and which batches make a shard.

Samples of similar length share a batch, so that little is computed on padding: they are sorted by length
inside windows of a few thousand, longest first, and cut by a budget of tokens. The plan is a pure function
of the lengths, so every process, now or after a crash, works on the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from capture.prefixes import arranged, usable
from pipeline.cache.index import plan_shards
from pipeline.rope import RopeLengths

if TYPE_CHECKING:
    from capture.data.tokens import TokenizedData

# Samples sorted together. A larger window pads less and spreads a shard's samples over more of the data.
WINDOW_SAMPLES = 4096
# A batch that computes its common beginning once still attends to it from every row, and has its keys and
# values for every row: tokens of a batch, by those that it may compute.
SPREAD = 4
# Tokens of a shard, by the rows of a state that it may have: ids and masks remain of what samples share.
TOKENS_A_ROW = 16


@dataclass(frozen=True)
class Limits:
    """Sizes that a plan keeps to."""

    batch_tokens: int
    """Maximum tokens that a forward computes, padding included, unless it has one sample."""
    shard_tokens: int
    """Maximum tokens per shard, of which rows are stored, unless it has one sample."""
    carries_on: bool = False
    """A batch computes what all its samples begin with once."""

    def cost(self, rows: int, longest: int, common: int) -> int | None:
        """Return the tokens that a batch computes, None if they are too many.

        Args:
            longest: tokens of the longest sample.
            common: first tokens that all samples have in common.
        """
        beginning = usable(common) if self.carries_on else 0
        computed = beginning + rows * (longest - beginning)
        fits = computed <= self.batch_tokens and rows * longest <= SPREAD * self.batch_tokens
        return computed if fits else None


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
    """Tokens that the target computes: each batch's rows times its longest sample, or less where rows begin
    alike, summed."""
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
    groups = (rope or RopeLengths()).groups(lengths[order])
    nothing = np.zeros(len(order), np.int64)
    return _plan(order, lengths[order], groups, nothing, Limits(batch_tokens, shard_tokens))


def plan_sharing(
    data: TokenizedData, last_rows: np.ndarray, limits: Limits, rope: RopeLengths | None = None
) -> tuple[CapturePlan, np.ndarray]:
    """Plan batches and shards of samples that share the context of equal beginnings.

    Args:
        last_rows: rows of last hidden states that are stored of each sample, `[n]`.

    Returns:
        The plan; and how many first tokens each sample has in common with the one before in its shard, `[n]`.
    """
    lengths = data.facts.lengths
    groups = (rope or RopeLengths()).groups(lengths)
    order, shared = arranged(data, groups, WINDOW_SAMPLES)
    own = lengths[order] - shared
    weights = np.maximum(own, np.maximum(last_rows[order], -(-lengths[order] // TOKENS_A_ROW)))
    plan = _plan(order, lengths[order], groups[order], shared, limits, weights)
    shared[[members.start for members in plan.shards]] = 0
    return plan, shared


def _plan(
    order: np.ndarray,
    lengths: np.ndarray,
    groups: np.ndarray,
    shared: np.ndarray,
    limits: Limits,
    weights: np.ndarray | None = None,
) -> CapturePlan:
    """Cut samples, in their order, into batches, and these into shards.

    Args:
        groups: of each sample; those of two groups share no batch.
        shared: first tokens that each has in common with the one before.
        weights: what each adds to a shard behind the one before; None is its tokens.
    """
    sizes, common, kinds = lengths.tolist(), shared.tolist(), groups.tolist()
    adds = sizes if weights is None else weights.tolist()
    batches: list[range] = []
    computed: list[int] = []
    stored: list[int] = []
    regained: list[int] = []  # what a batch's first sample adds besides where it is its shard's first
    for start in range(0, len(sizes), WINDOW_SAMPLES):
        stop = min(start + WINDOW_SAMPLES, len(sizes))
        while start < stop:
            longest, alike, rows = sizes[start], sizes[start] - 1, adds[start]
            cost, end = longest, start + 1
            regained.append(max(0, sizes[start] - rows))
            while end < stop and kinds[end] == kinds[start]:
                most, beginning = max(longest, sizes[end]), min(alike, common[end], sizes[end] - 1)
                more = limits.cost(end + 1 - start, most, beginning)
                added = rows + adds[end]
                if more is None or added + regained[-1] > limits.shard_tokens:
                    break
                longest, alike, rows, cost, end = most, beginning, added, more, end + 1
            batches.append(range(start, end))
            computed.append(cost)
            stored.append(rows)
            start = end
    shards = plan_shards(stored, limits.shard_tokens, regained)
    return CapturePlan(order, batches, shards, sum(computed), sum(sizes))
