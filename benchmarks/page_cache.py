"""Put a cache's shards into the operating system's page cache, drop them from it, or count what is in it."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
from pathlib import Path

import numpy as np


def shards_of(path: Path) -> list[Path]:
    """Return the files of a cache's shards."""
    return sorted((path / "shards").iterdir())


def cached_bytes(path: Path) -> int:
    """Return the bytes of a cache's shards that are in the page cache, by mincore."""
    total = 0
    for shard in shards_of(path):
        with shard.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as data:
            pages = (ctypes.c_ubyte * -(-len(data) // mmap.PAGESIZE))()
            place = ctypes.c_char.from_buffer(data)
            address, length = ctypes.c_void_p(ctypes.addressof(place)), ctypes.c_size_t(len(data))
            del place  # a map can't be closed while a view exists
            if ctypes.CDLL(None, use_errno=True).mincore(address, length, pages):
                raise OSError(ctypes.get_errno(), "mincore", str(shard))
            total += int((np.frombuffer(pages, dtype=np.uint8) & 1).sum()) * mmap.PAGESIZE
    return total


def drop_cached(path: Path) -> None:
    """Drop a cache's shards from the page cache. No reader may be open, because mapped pages stay."""
    gc.collect()
    for shard in shards_of(path):
        descriptor = os.open(shard, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    left = cached_bytes(path)
    if left > 2**20:
        raise SystemExit(f"{left} bytes of {path} stay in the page cache: cold reads can't be measured here")


def warm(path: Path) -> None:
    """Put a cache's shards into the page cache."""
    for shard in shards_of(path):
        with shard.open("rb", buffering=0) as file:
            while file.read(2**24):
                pass
