"""How far an incomplete cache is, for whoever looks from outside: nothing is written or waited for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline import files
from pipeline.cache.manifest import PROGRESS, FileRecord, Manifest
from pipeline.cache.progress.records import read_kept, read_shard_record, read_target_record


@dataclass(frozen=True)
class Finished:
    """The files of an incomplete cache that are said to be finished."""

    shards: dict[int, FileRecord]
    others: tuple[FileRecord, ...]
    """Of `target/`; empty until it is written."""

    def files(self) -> list[FileRecord]:
        """All of them, shards first."""
        return [*(self.shards[shard] for shard in sorted(self.shards)), *self.others]


def finished_files(cache: Path, manifest: Manifest) -> Finished:
    """What the records under `progress/` say is finished; a record that makes no sense says nothing.

    Shards that a reopened cache kept (FORMAT.md, rule 22) are among them. A file that was moved away is not:
    it is to be written again, and so the writer sees it too.
    """
    folder, number = cache / PROGRESS, len(manifest.plan)
    kept = read_kept(folder, number)
    records: dict[int, FileRecord] = {}
    listed = {shard for shard, _ in listed_shards(cache / "shards", ".safetensors")}
    for shard in sorted(listed & set(range(number))):
        record = read_shard_record(folder, shard, kept)
        if record:
            records[shard] = record
    target = read_target_record(folder)
    others = target.files if target else ()
    return Finished(records, tuple(each for each in others if os.path.lexists(cache / each.file)))


def finished_shards(cache: Path, manifest: Manifest) -> dict[int, int]:
    """The size in bytes of every finished shard, by number: two directories are listed, no record is read."""
    number = len(manifest.plan)
    recorded = {shard for shard, _ in listed_shards(cache / PROGRESS, ".json")}
    recorded |= {shard for shard, size in enumerate(read_kept(cache / PROGRESS, number).bytes) if size}
    return {
        shard: size
        for shard, size in listed_shards(cache / "shards", ".safetensors")
        if shard in recorded and shard < number
    }


def listed_shards(folder: Path, suffix: str) -> Iterator[tuple[int, int]]:
    """Number and size of every plain file in `folder` named as a shard's is; files may come and go."""
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
                except OSError:  # gone this moment
                    continue
    except OSError:  # no such folder, or no longer
        return


def target_written(cache: Path) -> bool:
    """Whether `target/` is said to be finished."""
    return files.plain_size(cache / PROGRESS / "target.json") > 0
