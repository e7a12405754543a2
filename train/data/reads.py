"""The way batches are read: through the page cache, or past it.

While a cache's pages are in memory nothing is faster than them. A cache that is larger than memory never has
them there: then reads past the page cache may be faster. `auto` tries both on the first batches.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock

from pipeline.cache import CacheReader
from pipeline.cache.codecs import get_codec
from pipeline.cache.direct import DirectReads
from pipeline.errors import ConfigError
from pipeline.text import size

AUTO, MMAP, DIRECT = "auto", "mmap", "direct"
# Batches that auto reads each way before it decides.
TRIALS = 8
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
        self._rates: dict[bool, list[float]] = {False: [], True: []}
        self._given = 0
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
            return self._given % 2 == 0 if self._direct is None else self._direct

    @contextmanager
    def timed(self, direct: bool, samples: Sequence[int]) -> Iterator[None]:
        """Time a block that reads these samples in the way that `direct` gave."""
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        with self._lock:
            if self._direct is not None:
                return
            self._rates[direct].append(used_bytes(self._reader, samples, self._layer_ids) / seconds)
            if min(map(len, self._rates.values())) >= TRIALS:
                self._decide()

    def _decide(self) -> None:
        past, through = (statistics.median(self._rates[way]) for way in (True, False))
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
    """Return the bytes of states that an epoch over these samples reads."""
    features, width = reader.manifest.identity.features, reader.hidden_size
    tokens = int(reader.lengths[list(samples)].sum())
    total = tokens * len(layer_ids) * get_codec(features.context_codec).row_bytes(width)
    if features.has_last_hidden:
        rows = int(reader.last_rows[list(samples)].sum())
        total += rows * get_codec(features.last_codec).row_bytes(width)
    return int(total)


def available_memory(table: Path = Path("/proc/meminfo")) -> int | None:
    """Return the bytes of memory that are free or can be freed; None where the system does not tell."""
    try:
        lines = table.read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None
