"""Split of the cache into training samples and held-out samples."""

from __future__ import annotations

import numpy as np

from pipeline.cache import CacheReader
from pipeline.cache.split import held_out, held_out_problem
from pipeline.errors import ConfigError


def split(reader: CacheReader, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of the training samples and of the held-out ones, by a hash of their content.

    Raises:
        ConfigError: no sample is left to train on, or none is held out although `fraction` is above 0. It
            names the smallest share that works.
    """
    problem = held_out_problem(reader.sample_ids, fraction)
    if problem:
        raise ConfigError(problem)
    out = held_out(reader.sample_ids, fraction)
    return np.flatnonzero(~out), np.flatnonzero(out)
