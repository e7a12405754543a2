"""Assignment of samples to batches: pure functions of (lengths, seed, epoch, rank, world).

A batch is a *pack*: samples laid end to end in one row of a fixed number of tokens. An optimiser step is a
group of packs, which does not depend on the world size.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from train.config import TrainConfig

# Packs filled together from consecutive shuffled samples. More packs fill better and mix less.
WINDOW_PACKS = 64


def pack(lengths: Sequence[int], order: Iterable[int], batch_tokens: int) -> list[list[int]]:
    """Lay samples into packs of at most `batch_tokens` tokens (best-fit decreasing).

    Args:
        lengths: tokens of every sample, none above `batch_tokens`.
        order: the samples to pack; samples of equal length keep this order.

    Returns:
        The samples of each pack, in the order that the packs were started.
    """
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # tokens left and number of each pack, ascending
    for sample in sorted(order, key=lambda i: -lengths[i]):  # stable, so equals keep their order
        length = lengths[sample]
        fitting = bisect_left(room, (length, 0))
        if fitting < len(room):
            left, number = room.pop(fitting)
        else:
            left, number = batch_tokens, len(packs)
            packs.append([])
        packs[number].append(sample)
        insort(room, (left - length, number))
    return packs


def epoch_packs(
    lengths: np.ndarray,
    batch_tokens: int,
    seed: int,
    epoch: int,
    shards: np.ndarray | None = None,
    shuffle_shards: int | None = None,
) -> list[np.ndarray]:
    """Return an epoch's packs: each sample once, shuffled.

    Samples are shuffled and packed window by window. Samples of a window's last packs, which are filled
    badly, move to the next window. Then the packs are shuffled. A block shuffle does that to a few shards at
    a time, in a shuffled order of the shards, so that each shard is read in one part of the epoch.

    Args:
        lengths: tokens of each sample, `[n]`, none above `batch_tokens`.
        batch_tokens: P, tokens per pack.
        shards: shard of each sample, `[n]`, for a block shuffle.
        shuffle_shards: shards shuffled together; None shuffles all samples together.

    Returns:
        The sample numbers of each pack.
    """
    rng = np.random.default_rng((seed, epoch))
    tokens = lengths.tolist()
    blocks: Iterable[np.ndarray] = [np.arange(len(tokens))]
    if shuffle_shards is not None:
        if shards is None:
            raise ValueError("a block shuffle needs the shard of each sample")
        blocks = _blocks(shards, shuffle_shards, rng)
    found: list[np.ndarray] = []
    for block in blocks:
        packs = _window_packs(tokens, rng.permutation(block).tolist(), batch_tokens)
        found += [np.array(packs[i], dtype=np.int64) for i in rng.permutation(len(packs))]
    return found


def _blocks(shards: np.ndarray, together: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Return the samples of every `together` shards, the shards in a shuffled order."""
    by_shard = np.argsort(shards, kind="stable")
    _, starts = np.unique(shards[by_shard], return_index=True)
    each = np.split(by_shard, starts[1:])
    order = rng.permutation(len(each)).tolist()
    groups = (order[start : start + together] for start in range(0, len(order), together))
    return [np.concatenate([each[shard] for shard in group]) for group in groups]


def _window_packs(tokens: list[int], order: list[int], batch_tokens: int) -> list[list[int]]:
    """Pack samples window by window, in this order."""
    packs: list[list[int]] = []
    window: list[int] = []
    size = 0
    for sample in order:
        window.append(sample)
        size += tokens[sample]
        if size >= WINDOW_PACKS * batch_tokens:
            full = pack(tokens, window, batch_tokens)
            packs += full[:WINDOW_PACKS]
            window = [i for late in full[WINDOW_PACKS:] for i in late]
            size = sum(tokens[i] for i in window)
    return packs + pack(tokens, window, batch_tokens)


def epoch_steps(
    lengths: np.ndarray,
    batch_tokens: int,
    packs_per_step: int,
    seed: int,
    epoch: int,
    rank: int = 0,
    world: int = 1,
    shards: np.ndarray | None = None,
    shuffle_shards: int | None = None,
) -> list[list[np.ndarray]]:
    """Return one rank's share of an epoch: its packs of each optimiser step.

    A step has the same `packs_per_step` packs for any world size. The ranks take them in turn.

    Args:
        lengths: tokens of each sample, `[n]`.
        batch_tokens: P.
        packs_per_step: packs of a step over all ranks; the last step of an epoch may have fewer.
        shards: see `epoch_packs`, as `shuffle_shards`.

    Returns:
        The packs of each step. All ranks get the same number; a rank that lacks a pack gets an empty one.
    """
    packs = epoch_packs(lengths, batch_tokens, seed, epoch, shards, shuffle_shards)
    groups = (packs[start : start + packs_per_step] for start in range(0, len(packs), packs_per_step))
    return [share(group, rank, world) for group in groups]


def share(packs: list[np.ndarray], rank: int, world: int) -> list[np.ndarray]:
    """Return one rank's packs of a group that ranks take in turn. Empty packs make the shares equal."""
    empty = [np.empty(0, dtype=np.int64)] * (-len(packs) % world)
    return (packs + empty)[rank::world]


def sequential_packs(lengths: np.ndarray, batch_tokens: int) -> list[np.ndarray]:
    """Return the packs of an evaluation: every sample once, in a fixed order."""
    packs = pack(lengths.tolist(), range(len(lengths)), batch_tokens)
    return [np.array(members, dtype=np.int64) for members in packs]


@dataclass(frozen=True)
class Step:
    """One rank's part of an optimiser step."""

    epoch: int
    number: int
    """Number of the step in its epoch, from 0."""
    packs: list[list[int]]
    """Sample numbers of each micro-batch."""


def steps_from(
    lengths: np.ndarray,
    shards: np.ndarray,
    samples: np.ndarray,
    config: TrainConfig,
    epoch: int = 0,
    number: int = 0,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Step]:
    """Yield one rank's steps without end, epoch by epoch, from a position in the data order.

    Args:
        lengths: tokens of each training sample, `[n]`.
        shards: shard of each training sample, `[n]`.
        samples: the samples' numbers in the cache, `[n]`.
        epoch: epoch of the first step.
        number: number of the first step in its epoch.
    """
    shape = (config.batch_tokens, config.micro_batches_per_step, config.seed)
    for each in itertools.count(epoch):
        steps = epoch_steps(lengths, *shape, each, rank, world, shards, config.shuffle_shards)
        for i in range(number if each == epoch else 0, len(steps)):
            yield Step(each, i, [samples[members].tolist() for members in steps[i]])


def count_steps(lengths: np.ndarray, shards: np.ndarray, config: TrainConfig) -> int:
    """Return the number of optimiser steps of a run over samples of these lengths and shards, each `[n]`."""
    if config.max_steps is not None:
        return config.max_steps
    shape = (config.batch_tokens, config.micro_batches_per_step, config.seed)
    blocks = {"shards": shards, "shuffle_shards": config.shuffle_shards}
    return sum(len(epoch_steps(lengths, *shape, epoch, **blocks)) for epoch in range(config.epochs))
