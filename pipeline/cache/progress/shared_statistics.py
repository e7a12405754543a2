"""The statistics of a cache at work: measured by one process, used by all of its shards."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from pipeline import files
from pipeline.cache.codecs import Statistics
from pipeline.cache.manifest import STATISTICS, FileRecord, Identity
from pipeline.cache.progress.records import Records, ShardRecord
from pipeline.cache.statistics import read_statistics, standardised_states, statistics_bytes
from pipeline.errors import CacheError


class SharedStatistics:
    """The file of statistics, and the shards' records of it.

    Args:
        cache: the cache directory.
        identity: of the cache.
        records: of its shards.
        shards: their number.
    """

    def __init__(self, cache: Path, identity: Identity, records: Records, shards: int):
        self.sha256 = ""
        """Of the file, once this process has read it."""
        self._path, self._identity = cache / STATISTICS, identity
        self._records, self._shards = records, shards
        self._needed = bool(standardised_states(identity))

    def read(
        self,
        measure: Callable[[], Mapping[str, Statistics]],
        unless_completed: Callable[[], AbstractContextManager],
    ) -> dict[str, Statistics]:
        """Return the statistics by state; empty if no codec needs any.

        Args:
            measure: called if there are none yet. If several processes measure, the first to publish decides
                for all.
            unless_completed: returns a block in which writing may fail because the cache is complete.

        Raises:
            CacheError: shards were written with other statistics, which are lost or damaged.
        """
        if not self._needed:
            return {}
        if files.plain_size(self._path) < 0:
            data = b"".join(statistics_bytes(measure()))
            # In this order: another process that wrote shards meanwhile published its file before them.
            if self._others_than(hashlib.sha256(data).hexdigest()) and files.plain_size(self._path) < 0:
                raise CacheError(
                    f"{self._path} is lost and a new measurement differs from it, so existing shards can't "
                    "be read: remove the cache, then run the same command again"
                )
            with unless_completed():
                files.publish_bytes(self._path, data, replace=False)
        found = read_statistics(self._path.parent, self._identity)
        self.sha256 = files.sha256_file(self._path)
        if self._others_than(self.sha256):
            raise self._damaged()
        return found

    def _others_than(self, digest: str) -> bool:
        """Return whether the first finished shard was written with statistics of another SHA-256.

        Every process asks this, so the other shards are left to `finished`, which reads all records anyway.
        """
        first = next(filter(None, map(self._records.shard, range(self._shards))), None)
        return first is not None and first.statistics != digest

    def _damaged(self) -> CacheError:
        return CacheError(
            f"{self._path} is damaged (its hash is not the one that shards were written with): remove it, "
            "then run the same command again"
        )

    def written(self) -> bool:
        """Return whether they are published, by any process, or none are needed."""
        return not self._needed or files.plain_size(self._path) >= 0

    def finished(self, shards: Sequence[ShardRecord]) -> list[FileRecord]:
        """Return the record of the file, or nothing if none is needed.

        Args:
            shards: the records of all shards.

        Raises:
            CacheError: the file is lost, or not the one that they were written with.
        """
        if not self._needed:
            return []
        size = files.plain_size(self._path)
        if size < 0:
            raise CacheError(f"{self._path} is lost: run the same command again")
        found = FileRecord(file=STATISTICS, bytes=size, sha256=files.sha256_file(self._path))
        if any(shard.statistics != found.sha256 for shard in shards):
            raise self._damaged()
        return [found]
