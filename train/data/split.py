"""Split of the cache into training samples and held-out samples."""

from __future__ import annotations

import numpy as np

from pipeline.cache import CacheReader, held_out
from pipeline.errors import ConfigError


def split(reader: CacheReader, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the numbers of the training samples and of the held-out ones, by a hash of their content.

    Raises:
        ConfigError: no sample is left to train on, or none is held out although `fraction` is above 0.
    """
    out = held_out(reader.sample_ids, fraction)
    train, test = np.flatnonzero(~out), np.flatnonzero(out)
    if not len(train) or (fraction > 0 and not len(test)):
        side = "held out" if len(train) else "left to train on"
        raise ConfigError(
            f"train.held_out = {fraction} leaves no sample {side} of the cache's {len(reader)}: "
            "choose another share, or capture more data"
        )
    return train, test
