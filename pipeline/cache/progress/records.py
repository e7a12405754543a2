"""What `progress/` says of an incomplete cache, read as if anybody had written it."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from pipeline import config, files
from pipeline.cache.manifest import (
    FROZEN,
    MAX_MANIFEST_BYTES,
    FileRecord,
    ShardFiles,
    is_sha256,
    is_target_file,
    shard_file,
)
from pipeline.errors import ConfigError

T = TypeVar("T")

KEPT, TARGET = "kept.json", "target.json"
# A record lists a few figures of a few rows.
MAX_RECORD_BYTES = 2**20


@dataclass(frozen=True, kw_only=True)
class ShardRecord(FileRecord):
    """A finished shard, and what was measured while it was captured."""

    measured: dict[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    statistics: str = ""
    """The hash of the statistics it was written with, if any: it can't be read with others."""


@dataclass(frozen=True, kw_only=True)
class TargetRecord:
    """The finished `target/` folder, and what the proof before the first shard measured."""

    files: tuple[FileRecord, ...]
    proof: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Kept(ShardFiles):
    """What a damaged cache was reopened with; a size of 0 marks a shard to be written again."""

    statistics: str = ""
    """As in ShardRecord, of every shard that was kept."""


def read_record(path: Path, cls: type[T], limit: int = MAX_RECORD_BYTES) -> T | None:
    """A record, or None where there is none that makes sense."""
    try:
        return config.build(cls, json.loads(files.read_small(path, limit)))
    except (OSError, ValueError, RecursionError, ConfigError):
        return None


def read_kept(folder: Path, number: int) -> Kept:
    """What a reopened cache of so many shards kept; empty where nothing there makes sense."""
    kept = read_record(folder / KEPT, Kept, MAX_MANIFEST_BYTES)
    if kept is None or not len(kept.bytes) == len(kept.sha256) == number:
        return Kept()
    return kept if all(map(is_sha256, kept.sha256)) else Kept()


def read_shard_record(folder: Path, shard: int, kept: Kept) -> ShardRecord | None:
    """The record of a finished shard, its own or what was kept; None while there is none."""
    name = shard_file(shard)
    record = read_record(folder / f"{shard:05d}.json", ShardRecord)
    if record is None and kept.bytes and kept.bytes[shard]:
        record = ShardRecord(
            file=name, bytes=kept.bytes[shard], sha256=kept.sha256[shard], statistics=kept.statistics
        )
    if record is None or record.file != name or not is_sha256(record.sha256):
        return None
    return record if not record.statistics or is_sha256(record.statistics) else None


def read_target_record(folder: Path) -> TargetRecord | None:
    """The record of the finished `target/`; None while there is none."""
    record = read_record(folder / TARGET, TargetRecord)
    if record is None:
        return None
    names = [each.file for each in record.files]
    good = len({*names}) == len(names) and FROZEN in names
    good = good and all(name == FROZEN or is_target_file(name) for name in names)
    return record if good and all(is_sha256(each.sha256) for each in record.files) else None
