"""Split of the cache into training samples and held-out samples."""

from __future__ import annotations

import numpy as np

from pipeline.cache import CacheReader
from pipeline.cache.split import held_out, held_out_problem, kept_share
from pipeline.errors import ConfigError


def split(reader: CacheReader, fraction: float, share: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of the training samples and of the held-out ones, by a hash of their content.

    Args:
        fraction: share of the samples to hold out.
        share: share of the others to train on.

    Raises:
        ConfigError: no sample is left to train on, or none is held out although `fraction` is above 0. It
            names the smallest share that works.
    """
    problem = held_out_problem(reader.sample_ids, fraction)
    if problem:
        raise ConfigError(problem)
    kept = kept_share(reader.sample_ids, fraction, share)
    if not kept.any():
        raise ConfigError(
            f"train.data_share = {share} leaves no sample to train on of the cache's {len(kept):,}: raise it"
        )
    return np.flatnonzero(kept), np.flatnonzero(held_out(reader.sample_ids, fraction))
