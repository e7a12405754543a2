"""Shards of an object store, fetched before the batches that read them."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from pipeline.cache import CacheReader

# Fetches at once. Each makes requests for many ranges at a time.
THREADS = 4
# Batches whose pieces are fetched ahead, if there is room for more.
MOST_PACKS = 256

Chosen = tuple[Sequence[int], Any]
"""Samples of a batch, and what else is known of it."""


def fetched_ahead(reader: CacheReader, packs: Iterable[Chosen]) -> Iterator[Chosen]:
    """Yield packs in order, while what later ones read is fetched into half of the local store.

    A cache in a directory has nothing to fetch.

    Raises:
        DSparkError: a shard can't be fetched; raised in place of the first pack that reads it.
    """
    if not reader.files.remote:
        yield from packs
        return
    source, coming = iter(packs), deque[tuple[Chosen, list[Hashable]]]()
    fetches: dict[Hashable, Future] = {}
    readers: Counter[Hashable] = Counter()  # coming packs of each piece
    ahead = 0
    with ThreadPoolExecutor(THREADS, thread_name_prefix="fetches") as pool:
        try:
            while True:
                while not coming or (ahead < reader.files.ahead_bytes and len(coming) < MOST_PACKS):
                    pack = next(source, None)
                    if pack is None:
                        break
                    pieces = list(dict.fromkeys(map(reader.piece, pack[0])))
                    coming.append((pack, pieces))
                    for piece in pieces:
                        if not readers[piece]:
                            fetches[piece] = pool.submit(reader.files.fetch, piece)
                            ahead += reader.files.size(piece)
                    readers.update(pieces)
                if not coming:
                    return
                pack, pieces = coming.popleft()
                for piece in pieces:
                    fetches[piece].result()
                yield pack
                readers.subtract(pieces)
                for piece in [piece for piece in pieces if not readers[piece]]:
                    ahead -= reader.files.size(piece)
                    del fetches[piece], readers[piece]
        finally:
            for fetch in fetches.values():
                fetch.cancel()
