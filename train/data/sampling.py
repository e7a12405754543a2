"""Which positions of a sample are drafted from: pure functions of (candidates, sample id, seed, epoch)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

AnchorChoice = Callable[[list[np.ndarray], list[bytes]], list[np.ndarray]]
"""From each sample's candidates, ascending, and the samples' ids to each sample's anchors, ascending."""


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
