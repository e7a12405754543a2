"""Reads of shards past the page cache, several at a time.

Where a cache is much larger than memory, each page that is read through the page cache is copied once more,
and pushes out another one that will be needed as little. A read with O_DIRECT goes from the disk into the
process's memory, in whole blocks, which are then cut to the bytes asked for.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.cache.shard import MappedShard, cut_short
from pipeline.errors import CacheError
from pipeline.text import reason

# Reads begin and end at multiples of this, which suits almost every disk. One that asks for more is read
# through its page cache after all.
BLOCK_BYTES = 4096
# Bytes of one read: longer pieces are cut.
READ_BYTES = 2**20
# Reads at once: what it takes to keep a fast disk busy.
THREADS = 16


class Piece(NamedTuple):
    """Bytes of a shard, and where they go."""

    shard: MappedShard
    view: Tensor
    """Of the shard's tensors; only its place counts."""
    out: Tensor
    """Contiguous CPU memory of the same size."""


class DirectReads:
    """Threads that read pieces past the page cache. Safe to use from several threads."""

    def __init__(self, threads: int = THREADS):
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="direct")
        self._own = threading.local()

    def read(self, pieces: Sequence[Piece]) -> None:
        """Read pieces of shards that were mapped with `direct`.

        Raises:
            CacheError: a file has become shorter, or can't be read.
        """
        list(self._pool.map(self._read, _cut(pieces)))

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)

    def _read(self, part: tuple[MappedShard, int, memoryview]) -> None:
        shard, offset, out = part
        memory = getattr(self._own, "memory", None)
        if memory is None:  # pages of its own are aligned as O_DIRECT asks
            memory = self._own.memory = memoryview(mmap.mmap(-1, READ_BYTES + 2 * BLOCK_BYTES))
        begin = offset // BLOCK_BYTES * BLOCK_BYTES
        end = -(-(offset + len(out)) // BLOCK_BYTES) * BLOCK_BYTES
        file = shard.descriptor if shard.direct is None else shard.direct
        got = 0
        while begin + got < offset + len(out):
            try:
                count = os.preadv(file, [memory[got : end - begin]], begin + got)
            except OSError as error:
                if file == shard.descriptor:
                    raise CacheError(f"{shard.path} can't be read ({reason(error)})") from error
                file = shard.descriptor  # a file system that refuses blocks of this size
                continue
            reached = got + count
            if begin + reached < offset + len(out):  # it stopped early, and goes on at a whole block
                reached = reached // BLOCK_BYTES * BLOCK_BYTES
                if reached <= got:
                    raise cut_short(shard.path, begin + got + count)
            got = reached
        out[:] = memory[offset - begin : offset - begin + len(out)]


def _cut(pieces: Iterable[Piece]) -> Iterator[tuple[MappedShard, int, memoryview]]:
    """Cut pieces into reads: shard, offset in its file, and where the bytes go."""
    for shard, view, out in pieces:
        offset, left = shard.offset(view), memoryview(out.view(-1).view(torch.uint8).numpy())
        for start in range(0, len(left), READ_BYTES):
            yield shard, offset + start, left[start : start + READ_BYTES]
