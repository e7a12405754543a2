"""Records in `progress/` of an incomplete cache's finished files, read as if anybody had written them."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pipeline import config, files
from pipeline.cache.manifest import (
    FROZEN,
    MAX_MANIFEST_BYTES,
    PROGRESS,
    STATISTICS,
    FileRecord,
    Manifest,
    ShardFiles,
    is_sha256,
    is_target_file,
    shard_file,
)
from pipeline.cache.optional import LEFT_OUT, plain_values
from pipeline.cache.skipped import is_possible
from pipeline.errors import ConfigError

T = TypeVar("T")

KEPT, TARGET = "kept.json", "target.json"
# A record lists a few figures of a few rows.
MAX_RECORD_BYTES = 2**20
# `progress/` of a complete cache is renamed to a name with this prefix before it is removed file by file.
_DONE = ".progress-done"


@dataclass(frozen=True, kw_only=True)
class ShardRecord(FileRecord):
    """A finished shard, and the figures measured while it was captured."""

    measured: dict[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    statistics: str = ""
    """SHA-256 of the statistics it was written with, empty without: it can't be read with others."""
    skipped: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict, metadata=LEFT_OUT)
    """Its skipped samples: by reason, their numbers in the shard from 0."""
    tensors: dict[str, str] = dataclasses.field(default_factory=dict, metadata=LEFT_OUT)
    """SHA-256 of its tensors, by name, if it was written to an object store."""
    tag: str = dataclasses.field(default="", metadata=LEFT_OUT)
    """The store's own name for the bytes that were written, likewise."""


@dataclass(frozen=True, kw_only=True)
class TargetRecord:
    """The finished `target/` folder, and the figures of the proof before the first shard."""

    files: tuple[FileRecord, ...]
    proof: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Kept(ShardFiles):
    """The shards that a damaged cache kept when it was reopened; 0 bytes mark one to be written again."""

    statistics: str = ""
    """As in ShardRecord, for every kept shard."""
    skipped: dict[str, dict[str, tuple[int, ...]]] = dataclasses.field(default_factory=dict)
    """As in ShardRecord, by the number of each kept shard that has any."""


def read_record(path: Path, cls: type[T], limit: int = MAX_RECORD_BYTES) -> T | None:
    """Read a record; None without a valid one."""
    try:
        return config.build(cls, json.loads(files.read_small(path, limit)))
    except (OSError, ValueError, RecursionError, ConfigError):
        return None


def read_kept(folder: Path, number: int) -> Kept:
    """Read the kept shards of a reopened cache of `number` shards; empty without a valid record."""
    kept = read_record(folder / KEPT, Kept, MAX_MANIFEST_BYTES)
    if kept is None or not len(kept.bytes) == len(kept.sha256) == number:
        return Kept()
    return kept if all(map(is_sha256, kept.sha256)) else Kept()


def read_shard_record(folder: Path, shard: int, kept: Kept, samples: int) -> ShardRecord | None:
    """Read the record of a finished shard of `samples` samples, or make it from `kept`.

    Returns:
        None without a valid one.
    """
    name = shard_file(shard)
    record = read_record(folder / f"{shard:05d}.json", ShardRecord)
    if record is None and kept.bytes and kept.bytes[shard]:
        record = ShardRecord(
            file=name,
            bytes=kept.bytes[shard],
            sha256=kept.sha256[shard],
            statistics=kept.statistics,
            skipped=kept.skipped.get(str(shard), {}),
        )
    if record is None or record.file != name or not is_sha256(record.sha256):
        return None
    if not is_possible(record.skipped, samples):
        return None
    return record if not record.statistics or is_sha256(record.statistics) else None


def read_target_record(folder: Path) -> TargetRecord | None:
    """Read the record of the finished `target/`; None without a valid one."""
    record = read_record(folder / TARGET, TargetRecord)
    if record is None:
        return None
    names = [each.file for each in record.files]
    good = len({*names}) == len(names) and FROZEN in names
    good = good and all(name == FROZEN or is_target_file(name) for name in names)
    return record if good and all(is_sha256(each.sha256) for each in record.files) else None


class Records:
    """The records of one cache, and the files that they name.

    Args:
        cache: the cache directory.
        standardised: whether a codec of the cache needs statistics.
        samples: the plan's samples of each shard.
    """

    def __init__(self, cache: Path, standardised: bool, samples: Sequence[int]):
        self.cache, self.folder = cache, cache / PROGRESS
        self._standardised, self._samples = standardised, samples
        self._kept = Kept()
        self.elsewhere: set[str] = set()
        """Files that are in an object store, and not here."""

    def read_kept(self, number: int) -> None:
        """Take over the shards that a reopened cache of `number` shards kept."""
        self._kept = read_kept(self.folder, number)

    def matches(self, record: FileRecord) -> bool:
        """Return whether the recorded file exists and has the recorded size."""
        if record.file in self.elsewhere:
            return True
        return 0 <= record.bytes == files.plain_size(self.cache / record.file)

    def shard(self, shard: int) -> ShardRecord | None:
        """Return the record of a finished shard whose file still matches it."""
        record = read_shard_record(self.folder, shard, self._kept, self._samples[shard])
        if record is None or bool(record.statistics) != self._standardised:
            return None
        return record if self.matches(record) else None

    def target(self) -> TargetRecord | None:
        """Return the record of the finished `target/` if all its files still match it."""
        record = read_target_record(self.folder)
        return record if record and all(map(self.matches, record.files)) else None

    def publish(self, name: str, record: ShardRecord | TargetRecord) -> None:
        """Publish a record as `progress/<name>`. Raises WriteError."""
        files.publish_bytes(self.folder / name, json.dumps(plain_values(record)).encode())

    def remove_shard(self, shard: int) -> None:
        """Remove the record of a finished shard, and the claims to it, so that it is written again."""
        (self.folder / f"{shard:05d}.json").unlink(missing_ok=True)
        for claim in self.folder.glob(f"{shard:05d}*.claim"):
            claim.unlink(missing_ok=True)

    def publish_kept(self, found: Manifest, damaged: set[str]) -> None:
        """Publish which shards a complete cache keeps when it is reopened: all but the `damaged` ones."""
        self.folder.mkdir(exist_ok=True)
        good = [shard_file(shard) not in damaged for shard in range(len(found.plan))]
        kept: dict[str, Any] = {
            "bytes": [size * whole for size, whole in zip(found.shards.bytes, good, strict=True)],
            "sha256": list(found.shards.sha256),
            "statistics": next((r.sha256 for r in found.files if r.file == STATISTICS), ""),
        }
        skipped = found.skipped.by_shard(found.plan.samples)
        if any(good[shard] for shard in skipped):
            kept["skipped"] = {str(shard): each for shard, each in skipped.items() if good[shard]}
        files.publish_bytes(self.folder / KEPT, json.dumps(kept).encode())

    def remove(self) -> None:
        """Remove `progress/` of a complete cache, and temporary files of killed processes of any machine."""
        if self.folder.is_dir():
            with suppress(OSError):  # gone already, or not ours to remove: no reader looks at it
                self.folder.rename(Path(tempfile.mkdtemp(prefix=_DONE, dir=self.cache)))
        for done in self.cache.glob(f"{_DONE}*"):
            shutil.rmtree(done, ignore_errors=True)
        for folder in (self.cache / "shards", self.cache / "target"):
            for path in folder.glob(".*.partial"):
                with suppress(OSError):
                    path.unlink()
