"""What each optimiser step learns from: which samples, and which anchors of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from train.config import TrainConfig
from train.data.packing import epoch_steps

# Given the candidates of each sample of a batch, ascending, and their ids: the anchors of each, ascending.
AnchorChoice = Callable[[list[np.ndarray], list[bytes]], list[np.ndarray]]


def anchor_quotas(candidates: Sequence[int], total: int) -> np.ndarray:
    """How many anchors each sample gets: in proportion to its candidates, `total` in all if there are enough.

    Shares are rounded down; what is left goes to the largest remainders, the first of equals first.
    """
    counts = np.asarray(candidates, dtype=np.int64)
    if counts.sum() <= total:
        return counts
    shares, remainders = np.divmod(counts * total, counts.sum())
    left = total - shares.sum()
    shares[np.argsort(-remainders, kind="stable")[:left]] += 1
    return shares


def random_anchors(total: int, seed: int, epoch: int) -> AnchorChoice:
    """Training's choice: `total` a batch, in each sample uniform without replacement.

    A sample's anchors come from (seed, epoch, sample id) and its quota alone: whatever else is random, and
    the number of ranks, can't change them.
    """

    def choose(candidates: list[np.ndarray], sample_ids: list[bytes]) -> list[np.ndarray]:
        quotas = anchor_quotas([len(c) for c in candidates], total)
        return [_draw(c, q, s) for c, q, s in zip(candidates, quotas, sample_ids, strict=True)]

    def _draw(candidates: np.ndarray, quota: int, sample_id: bytes) -> np.ndarray:
        if len(candidates) == quota:
            return candidates
        rng = np.random.default_rng((seed, epoch, int.from_bytes(sample_id, "big")))
        return np.sort(rng.choice(candidates, quota, replace=False))

    return choose


def spread_anchors(each: int) -> AnchorChoice:
    """Evaluation's choice: up to `each` a sample, evenly spread over its candidates, always the same."""

    def choose(candidates: list[np.ndarray], _sample_ids: list[bytes]) -> list[np.ndarray]:
        places = [np.linspace(0, len(c) - 1, min(each, len(c))).round().astype(np.int64) for c in candidates]
        return [c[p] for c, p in zip(candidates, places, strict=True)]

    return choose


def drawn_anchors(each: int | None, seed: int) -> AnchorChoice:
    """Up to `each` a sample, uniform without replacement from (seed, sample id); None takes all."""

    def choose(candidates: list[np.ndarray], sample_ids: list[bytes]) -> list[np.ndarray]:
        return [draw(c, s) for c, s in zip(candidates, sample_ids, strict=True)]

    def draw(candidates: np.ndarray, sample_id: bytes) -> np.ndarray:
        if each is None or len(candidates) <= each:
            return candidates
        rng = np.random.default_rng((seed, int.from_bytes(sample_id, "big")))
        return np.sort(rng.choice(candidates, each, replace=False))

    return choose


@dataclass(frozen=True)
class Step:
    """One rank's part of an optimiser step."""

    epoch: int
    number: int
    """In its epoch, from 0."""
    packs: list[tuple[list[int], AnchorChoice]]
    """Sample numbers of each micro-batch, and how their anchors are chosen."""


def steps_from(
    lengths: np.ndarray,
    samples: np.ndarray,
    config: TrainConfig,
    epoch: int = 0,
    number: int = 0,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Step]:
    """One rank's steps, epoch after epoch without end, from a place in the data order on.

    Args:
        lengths: tokens of each training sample, `[n]`.
        samples: their numbers in the cache, `[n]`.
    """
    shape = (config.batch_tokens, config.micro_batches_per_step, config.seed)
    for each in itertools.count(epoch):
        choose = random_anchors(config.anchors_per_batch, config.seed, each)
        steps = epoch_steps(lengths, *shape, each, rank, world)
        for i in range(number if each == epoch else 0, len(steps)):
            yield Step(each, i, [(samples[members].tolist(), choose) for members in steps[i]])


def count_steps(lengths: np.ndarray, config: TrainConfig) -> int:
    """Optimiser steps of a run over samples of these lengths `[n]`."""
    if config.max_steps is not None:
        return config.max_steps
    shape = (config.batch_tokens, config.micro_batches_per_step, config.seed)
    return sum(len(epoch_steps(lengths, *shape, epoch)) for epoch in range(config.epochs))
