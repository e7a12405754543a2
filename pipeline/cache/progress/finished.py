"""Progress of an incomplete cache, for other commands: nothing is written or waited for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline import files
from pipeline.cache.manifest import PROGRESS, FileRecord, Manifest
from pipeline.cache.progress.records import ShardRecord, read_kept, read_shard_record, read_target_record


@dataclass(frozen=True)
class Finished:
    """Recorded files of an incomplete cache."""

    shards: dict[int, ShardRecord]
    others: tuple[FileRecord, ...]
    """Files of `target/`; empty until it is written."""

    def files(self) -> list[FileRecord]:
        """Return all records, shards first."""
        return [*(self.shards[shard] for shard in sorted(self.shards)), *self.others]


def finished_files(cache: Path, manifest: Manifest) -> Finished:
    """Read the records in `progress/`, without invalid ones.

    The result includes shards that a reopened cache kept (FORMAT.md, rule 22). It leaves out a file that was
    moved away: like the writer, it takes that file as one to be written again.
    """
    folder, number = cache / PROGRESS, len(manifest.plan)
    kept = read_kept(folder, number)
    records: dict[int, ShardRecord] = {}
    listed = {shard for shard, _ in listed_shards(cache / "shards", ".safetensors")}
    for shard in sorted(listed & set(range(number))):
        record = read_shard_record(folder, shard, kept, manifest.plan.samples[shard])
        if record:
            records[shard] = record
    target = read_target_record(folder)
    others = target.files if target else ()
    return Finished(records, tuple(each for each in others if os.path.lexists(cache / each.file)))


def finished_shards(cache: Path, manifest: Manifest) -> dict[int, int]:
    """Return the size in bytes of every finished shard, by number. Lists two directories, reads no record."""
    number = len(manifest.plan)
    recorded = {shard for shard, _ in listed_shards(cache / PROGRESS, ".json")}
    recorded |= {shard for shard, size in enumerate(read_kept(cache / PROGRESS, number).bytes) if size}
    return {
        shard: size
        for shard, size in listed_shards(cache / "shards", ".safetensors")
        if shard in recorded and shard < number
    }


def listed_shards(folder: Path, suffix: str) -> Iterator[tuple[int, int]]:
    """Yield number and size of every plain file in `folder` named by a shard; files may come and go."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                stem = entry.name.removesuffix(suffix)
                if stem == entry.name or not stem.isascii() or not stem.isdecimal() or len(stem) > 18:
                    continue
                if stem != f"{int(stem):05d}":
                    continue
                try:
                    if entry.is_file(follow_symlinks=False):
                        yield int(stem), entry.stat(follow_symlinks=False).st_size
                except OSError:  # just removed
                    continue
    except OSError:  # no such folder, or just removed
        return


def target_written(cache: Path) -> bool:
    """Return whether `target/` has a record that it is finished."""
    return files.plain_size(cache / PROGRESS / "target.json") > 0
