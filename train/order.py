"""The order of samples in an epoch: a pure function of (lengths, seed, epoch)."""

from __future__ import annotations

import numpy as np

# Batches whose samples are sorted by length together: longer windows pad less and mix less.
WINDOW_BATCHES = 16


def epoch_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Shuffle samples into batches of similar lengths.

    Samples are shuffled, sorted by length inside windows of `WINDOW_BATCHES` batches, cut into
    batches, and the batches shuffled.

    Args:
        lengths: tokens of each sample, `[n]`.

    Returns:
        Batches of sample numbers; each sample once, the last batch of the cut possibly smaller.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(lengths))
    window = batch_size * WINDOW_BATCHES
    batches = []
    for start in range(0, len(order), window):
        members = order[start : start + window]
        members = members[np.argsort(lengths[members], kind="stable")]
        batches += [members[i : i + batch_size] for i in range(0, len(members), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def sequential_batches(lengths: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """Batches for evaluation: by length, every sample once."""
    order = np.argsort(lengths, kind="stable")
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
