"""The cache of a run, wherever it lives."""

from __future__ import annotations

from pathlib import Path

from pipeline.cache import CacheReader
from pipeline.remote.address import Address, Place
from train.config import TrainConfig

# Shards of an object store that are shuffled together if the config does not say.
SHUFFLE_SHARDS = 32


def open_cache(place: Place, train: TrainConfig) -> CacheReader:
    """Open a run's cache; one in an object store with the run's local store. See `CacheReader`."""
    if not isinstance(place, Address):
        return CacheReader(place)
    from pipeline.cache.remote.local import default_store

    folder = None if train.local_cache_dir is None else Path(train.local_cache_dir)
    return CacheReader(place, store=default_store(folder, train.local_cache_bytes))


def shuffled_shards(reader: CacheReader, train: TrainConfig) -> int | None:
    """Return the number of shards that a run shuffles together; None for all."""
    return SHUFFLE_SHARDS if reader.files.remote and train.shuffle_shards is None else train.shuffle_shards
