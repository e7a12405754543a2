"""The way batches are read: through the page cache, or past it.

While a cache's pages are in memory nothing is faster than them. A cache that is larger than memory never has
them there: then reads past the page cache may be faster. `auto` tries both on the first batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

import numpy as np

from pipeline.cache import CacheReader
from pipeline.cache.codecs import get_codec
from pipeline.cache.direct import DirectReads
from pipeline.errors import ConfigError
from pipeline.text import size

AUTO, MMAP, DIRECT = "auto", "mmap", "direct"
# Batches that auto reads in one way before the other one's turn, and turns of each.
TRIALS, TURNS = 8, 2
# Reads past the page cache must be that much faster: they use the disk in every epoch.
MARGIN = 1.1


class Reads:
    """Decides for each batch how it is read.

    Args:
        reader: the cache. Shards that it maps from now on can be read past the page cache, unless `how` is
            mmap.
        how: auto, mmap or direct.
        layer_ids: layers that are read.
        used: bytes of the cache that an epoch reads.
        memory: bytes that the page cache can have; None if nobody knows.
        say: told by `tell` what auto has decided.

    Raises:
        ConfigError: direct is asked for, and the cache's disk can't.
    """

    def __init__(
        self,
        reader: CacheReader,
        how: str,
        layer_ids: Sequence[int],
        used: int,
        memory: int | None,
        say: Callable[[str], object] = lambda _line: None,
    ):
        self._reader, self._layer_ids = reader, layer_ids
        self._lock, self._news, self._say = Lock(), list[str](), say
        self._bytes, self._seconds = {False: 0, True: 0}, {False: 0.0, True: 0.0}
        self._given = self._timed = 0
        self._direct: bool | None = how == DIRECT
        """None while auto has not decided."""
        self.threads: DirectReads | None = None
        if how == MMAP:
            return
        check_reads(reader, how)
        if how == AUTO:
            if (memory is not None and used <= memory) or not reader.files.can_read_directly():
                return
            self._direct = None
        reader.files.read_directly()
        self.threads = DirectReads()

    def direct(self) -> bool:
        """Return whether the next batch is to be read past the page cache."""
        with self._lock:
            self._given += 1
            return (self._given - 1) // TRIALS % 2 == 1 if self._direct is None else self._direct

    @contextmanager
    def timed(self, direct: bool, samples: Sequence[int]) -> Iterator[None]:
        """Time a block that reads these samples in the way that `direct` gave."""
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        with self._lock:
            if self._direct is not None:
                return
            self._bytes[direct] += used_bytes(self._reader, samples, self._layer_ids)
            self._seconds[direct] += seconds
            self._timed += 1
            if self._timed == 2 * TRIALS * TURNS:
                self._decide()

    def _decide(self) -> None:
        past, through = (self._bytes[way] / max(self._seconds[way], 1e-9) for way in (True, False))
        self._direct = past > MARGIN * through
        chosen = "past the page cache" if self._direct else "through the page cache"
        self._news.append(f"reading {chosen}: {size(int(past))}/s past it, {size(int(through))}/s through it")

    def tell(self) -> None:
        """Say what was decided since the last call, from the thread that calls this."""
        with self._lock:
            news, self._news = self._news, []
        for line in news:
            self._say(line)

    def close(self) -> None:
        """End the threads."""
        if self.threads is not None:
            self.threads.close()


def check_reads(reader: CacheReader, how: str) -> None:
    """Raise ConfigError if reads past the page cache are asked for, and the cache's disk has none."""
    if how == DIRECT and not reader.files.can_read_directly():
        raise ConfigError(
            f'train.reader = "direct" reads past the page cache, which the disk of {reader.place} does not '
            'offer: set it to "auto" or "mmap"'
        )


def used_bytes(reader: CacheReader, samples: Sequence[int], layer_ids: Sequence[int]) -> int:
    """Return the bytes of states that are stored of these samples; of shared rows their share."""
    features, width, plan = reader.manifest.identity.features, reader.hidden_size, reader.manifest.plan
    chosen = np.asarray(samples, dtype=np.int64)
    tokens = int(reader.lengths[chosen].sum())
    rows = tokens * sum(plan.context_rows) // sum(plan.tokens)
    total = rows * len(layer_ids) * get_codec(features.context_codec).row_bytes(width)
    if features.has_last_hidden:
        last_rows = int(reader.last_rows[chosen].sum())
        total += last_rows * get_codec(features.last_codec).row_bytes(width)
    return int(total)


def available_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes of memory that are free or can be freed; None where the system does not tell.

    A container may have less than its machine (cgroup, version 2).
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        found = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None
    group = root / "sys/fs/cgroup"
    try:
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        lines = (group / "memory.stat").read_text().splitlines()
        cached = next(int(line.split()[1]) for line in lines if line.startswith("file "))
    except (OSError, StopIteration, ValueError):  # none, or "max"
        return found
    return min(found, max(0, limit - used + cached))
