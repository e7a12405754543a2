"""Choice of a sample's anchors: pure functions of (candidates, sample id, seed, epoch)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

AnchorChoice = Callable[[list[np.ndarray], list[bytes]], list[np.ndarray]]
"""Function from each sample's candidates and id to its anchors. Candidates and anchors ascend."""


def anchor_quotas(candidates: Sequence[int], total: int) -> np.ndarray:
    """Return each sample's number of anchors: `total` divided in proportion to the candidates.

    With fewer than `total` candidates, every candidate is an anchor. Shares are rounded down; the rest goes
    to the largest remainders, on a tie to the earlier sample.
    """
    counts = np.asarray(candidates, dtype=np.int64)
    if counts.sum() <= total:
        return counts
    shares, remainders = np.divmod(counts * total, counts.sum())
    left = total - shares.sum()
    shares[np.argsort(-remainders, kind="stable")[:left]] += 1
    return shares


def random_anchors(total: int, seed: int, epoch: int) -> AnchorChoice:
    """Return training's choice: `total` anchors per batch, in each sample uniform without replacement.

    A sample's anchors depend only on (seed, epoch, sample id) and its quota. The world size and other random
    draws don't change them.
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
    """Return evaluation's choice: up to `each` anchors per sample, evenly spread over its candidates."""

    def choose(candidates: list[np.ndarray], _sample_ids: list[bytes]) -> list[np.ndarray]:
        places = [np.linspace(0, len(c) - 1, min(each, len(c))).round().astype(np.int64) for c in candidates]
        return [c[p] for c, p in zip(candidates, places, strict=True)]

    return choose


def drawn_anchors(each: int | None, seed: int) -> AnchorChoice:
    """Return a choice of up to `each` anchors per sample, uniform by (seed, sample id); None takes all."""

    def choose(candidates: list[np.ndarray], sample_ids: list[bytes]) -> list[np.ndarray]:
        return [draw(c, s) for c, s in zip(candidates, sample_ids, strict=True)]

    def draw(candidates: np.ndarray, sample_id: bytes) -> np.ndarray:
        if each is None or len(candidates) <= each:
            return candidates
        rng = np.random.default_rng((seed, int.from_bytes(sample_id, "big")))
        return np.sort(rng.choice(candidates, each, replace=False))

    return choose
