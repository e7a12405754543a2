"""Compare obstore with pyarrow.fs as readers of an object store, through one S3 server on this machine.

    python benchmarks/object_store.py

Ranges as a run reads them: those of samples alone, tens of kilobytes each, and whole shards in parts of
8 MiB. The server is moto, in a process of its own, in Python: it, not the library, limits the bytes a second,
so only the ratio says something, and on a real store it may be another.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.record import record
from benchmarks.s3_server import PORT, s3_server
from pipeline.remote.address import Address
from pipeline.remote.objects import PART_BYTES, THREADS, Objects

SMALL, SMALL_BYTES = 100, 64 * 2**10
SHARD_BYTES, SHARDS = 32 * 2**20, 2
ROUNDS = 3


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    with s3_server():
        rows = _compare()
    record("object_store", torch.device("cpu"), rows)


def _compare() -> list[tuple[str, str, float, str]]:
    from pyarrow.fs import S3FileSystem

    objects = Objects(Address("s3://bucket/shards"))
    data = os.urandom(SHARD_BYTES)
    for shard in range(SHARDS):
        objects.write(str(shard), data)
    arrow = S3FileSystem(
        endpoint_override=f"127.0.0.1:{PORT}",
        scheme="http",
        access_key="key",
        secret_key="secret",
        region="us-east-1",
    )
    small = [(i * 150_000, i * 150_000 + SMALL_BYTES) for i in range(SMALL)]
    parts = [(start, start + PART_BYTES) for start in range(0, SHARD_BYTES, PART_BYTES)]
    pool = ThreadPoolExecutor(THREADS)

    def by_obstore(name: str, ranges: list[tuple[int, int]]) -> int:
        sizes: list[int] = []
        objects.read_ranges(name, ranges, lambda _offset, part: sizes.append(len(part)))
        return sum(sizes)

    def by_arrow(name: str, ranges: list[tuple[int, int]]) -> int:
        with arrow.open_input_file(f"bucket/shards/{name}") as file:
            read = pool.map(lambda span: len(file.read_at(span[1] - span[0], span[0])), ranges)
            return sum(read)

    def seconds(read: Callable[[str, list[tuple[int, int]]], int], ranges: list[tuple[int, int]]) -> float:
        began = time.perf_counter()
        for shard in range(SHARDS):
            assert read(str(shard), ranges) == sum(stop - start for start, stop in ranges)
        return time.perf_counter() - began

    rows = []
    for case, ranges in (("ranges of 64 KiB", small), ("whole shards of 32 MiB", parts)):
        found = [(seconds(by_obstore, ranges), seconds(by_arrow, ranges)) for _ in range(ROUNDS)]
        ours, theirs = (min(each) for each in zip(*found, strict=True))
        rows += [
            (case, "obstore", ours, "s"),
            (case, "pyarrow.fs", theirs, "s"),
            (case, "obstore / pyarrow.fs", ours / theirs, ""),
        ]
    return rows


if __name__ == "__main__":
    main()
