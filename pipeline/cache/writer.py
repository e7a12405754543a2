"""Write a cache: plan, then shards in any order by any number of processes, then the complete manifest.

Every file is published atomically, and a shard's record under `progress/` only after the shard, so
that a capture killed at any moment continues with the shards that have no record.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

import pyarrow as pa
from torch import Tensor

from pipeline import __version__, files
from pipeline.cache.codecs import Statistics
from pipeline.cache.fidelity import Measured, summarise
from pipeline.cache.index import index_bytes
from pipeline.cache.layout import shard_specs
from pipeline.cache.manifest import (
    FROZEN,
    INDEX,
    MANIFEST,
    PROGRESS,
    STATISTICS,
    FileRecord,
    Identity,
    Manifest,
    Plan,
    ShardFiles,
    origin,
    read_manifest,
    refuse_another,
    shard_file,
    write_manifest,
)
from pipeline.cache.progress.records import (
    KEPT,
    TARGET,
    Kept,
    ShardRecord,
    TargetRecord,
    read_kept,
    read_shard_record,
    read_target_record,
)
from pipeline.cache.shard import ShardBuffer, file_bytes, file_layout, shard_buffer
from pipeline.cache.statistics import read_statistics, standardised_states, statistics_bytes
from pipeline.errors import CacheError, WriteError

_FOLDERS = ("shards", PROGRESS, "target")
# What `progress/` is moved into once it is of no more use, so that it goes at once and whole.
_DONE = ".progress-done"


class CacheWriter:
    """Fills one cache directory according to one plan. Many processes may do so at once.

    Args:
        path: the cache directory; made if missing, continued if it holds the same identity.
        identity: what decides the cache's bytes.
        plan: what each shard holds, from `build_index`.
        index: the sample index, from `build_index`.
        rows: where every source row went, by reason.
        history: the caches this one is converted from, the first one first.

    Raises:
        CacheError: the directory holds another identity (the fields that differ are named), or
            files that are no cache.
        WriteError: it can't be written to.
    """

    def __init__(
        self,
        path: Path,
        identity: Identity,
        plan: Plan,
        index: pa.Table,
        rows: dict[str, int],
        history: tuple[dict[str, str], ...] = (),
    ):
        self.path = path
        self.progress = path / PROGRESS
        self._kept = Kept()
        self._standardised = bool(standardised_states(identity))
        self._statistics = ""  # the hash of their file, once this process has read it
        self.manifest = Manifest(
            created_by=f"dspark-pipeline {__version__}",
            identity=identity,
            rows=rows,
            plan=plan,
            fidelity={},
            history=history,
        )
        if path.is_symlink() and not path.exists():
            raise CacheError(f"{path} is a link to nothing: --cache must name a directory")
        if path.exists() and not path.is_dir():
            raise CacheError(f"{path} is a file: name a directory, new or holding a cache")
        try:
            if not (path / MANIFEST).exists():
                self._start()
            self._join(index)
        except OSError as error:
            raise files.write_error(error.filename or path, error) from error

    def _start(self) -> None:
        if self.path.exists():
            files.remove_partials(self.path)  # a capture killed while it wrote its first file
        self.path.mkdir(parents=True, exist_ok=True)
        strangers = [entry for entry in self.path.iterdir() if not entry.name.endswith(".partial")]
        if (self.path / MANIFEST).exists():  # another process started this very moment
            return
        if strangers:
            raise CacheError(
                f"{self.path} is not empty and holds no {MANIFEST}: choose an empty or new directory"
            )
        # Not over another: this process may have been held up here while others did the whole capture.
        files.publish_bytes(self.path / MANIFEST, self.manifest.to_json(), replace=False)

    def _join(self, index: pa.Table) -> None:
        """Take up a directory that has a manifest: a finished cache, or one to be continued."""
        for folder in (self.path / name for name in _FOLDERS):
            if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
                raise CacheError(f"{folder} is not a directory: remove it, a cache lies in one place")
        found = read_manifest(self.path)
        option = "directory" if self.manifest.history else "--cache"  # what the command calls it
        refuse_another(self.path, found.identity, self.manifest.identity, option)
        remedy = f"choose another {option}, or remove that directory"
        if found.plan != self.manifest.plan:
            raise CacheError(
                f"{self.path / MANIFEST} is damaged (its plan is not that of its samples): {remedy}"
            )
        if found.history != self.manifest.history:
            raise CacheError(
                f"{self.path} was {origin(found.history)}, not {origin(self.manifest.history)}: {remedy}"
            )
        if found.status == "complete":
            damaged = self._damaged(found)
            if not damaged:
                self.manifest = found
                self._remove_progress()
                return
            self._reopen(found, damaged)
        else:
            self.manifest = dataclasses.replace(
                self.manifest, created_by=found.created_by, fidelity=found.fidelity
            )
        for folder in _FOLDERS:
            (self.path / folder).mkdir(exist_ok=True)
            files.remove_partials(self.path / folder)
        again = read_manifest(self.path)
        if again.status == "complete":  # another process finished it this very moment
            self.manifest = again
            self._remove_progress()
            return
        files.remove_partials(self.path)
        self._kept = read_kept(self.progress, len(self.manifest.plan))
        self._write_index(index_bytes(index))

    def _damaged(self, manifest: Manifest) -> set[str]:
        """Files of a complete cache that are missing or have another size than they should."""
        return {record.file for record in manifest.all_files() if not self._is_there(record)}

    def _reopen(self, found: Manifest, damaged: set[str]) -> None:
        """Turn a complete but damaged cache back into an incomplete one that keeps its good shards."""
        self.progress.mkdir(exist_ok=True)
        good = [shard_file(shard) not in damaged for shard in range(len(found.plan))]
        kept = {
            "bytes": [size * whole for size, whole in zip(found.shards.bytes, good, strict=True)],
            "sha256": list(found.shards.sha256),
            "statistics": next((r.sha256 for r in found.files if r.file == STATISTICS), ""),
        }
        files.publish_bytes(self.progress / KEPT, json.dumps(kept).encode())
        # The rewritten shards are what they were, so what was measured stays true.
        self.manifest = dataclasses.replace(found, status="incomplete", shards=ShardFiles(), files=())
        write_manifest(self.path, self.manifest)

    def _write_index(self, data: bytes) -> None:
        path, digest = self.path / INDEX, hashlib.sha256(data).hexdigest()
        if files.plain_size(path) != len(data) or files.sha256_file(path) != digest:
            files.publish_bytes(path, data)
        self._index = FileRecord(file=INDEX, bytes=len(data), sha256=digest)

    @property
    def complete(self) -> bool:
        """Whether the cache is finished."""
        return self.manifest.status == "complete"

    def completed_by_another(self) -> bool:
        """Whether another process finished the cache meanwhile; if so, its manifest is the one to go by."""
        if not self.complete:
            found = read_manifest(self.path)
            if found.status == "complete":
                self.manifest = found
        return self.complete

    def pending(self) -> list[int]:
        """The shards still to be written, in order."""
        if self.complete or (not self.progress.is_dir() and self.completed_by_another()):
            return []
        return [shard for shard in range(len(self.manifest.plan)) if not self.written(shard)]

    def written(self, shard: int) -> bool:
        """Whether a shard is finished, by whichever process."""
        return self._record(shard) is not None

    def _progress_file(self, shard: int) -> Path:
        return self.progress / f"{shard:05d}.json"

    def _record(self, shard: int) -> ShardRecord | None:
        """The record of a published shard whose file is still as large as it was."""
        record = read_shard_record(self.progress, shard, self._kept)
        if record is None or bool(record.statistics) != self._standardised:
            return None
        return record if self._is_there(record) else None

    def new_shard(self, shard: int, memory: Tensor | None = None) -> ShardBuffer:
        """A shard to be filled; `memory` as in `pipeline.cache.shard.shard_buffer`."""
        return shard_buffer(shard_specs(self.manifest.identity, self.manifest.plan[shard]), memory)

    def shard_bytes(self, shard: int) -> int:
        """The size of a shard's file."""
        return file_layout(shard_specs(self.manifest.identity, self.manifest.plan[shard])).size

    def write_shard(
        self,
        shard: int,
        buffer: ShardBuffer,
        measured: Measured | None = None,
        step: Callable[[str], AbstractContextManager] = nullcontext,
    ) -> None:
        """Publish one shard, then its record.

        Args:
            buffer: from `new_shard(shard)`, filled.
            measured: what checking some of its rows gave.
            step: as in `pipeline.files.publish_bytes`.

        Raises:
            WriteError: the file can't be written; nothing of it is to be seen.
        """
        name = shard_file(shard)
        if self.written(shard):  # by another that held it too
            return
        with self._unless_completed():
            size, digest = files.publish_bytes(self.path / name, buffer.bytes(), step=step)
            record = ShardRecord(
                file=name,
                bytes=size,
                sha256=digest,
                measured=measured or {},
                statistics=self._statistics,
            )
            data = json.dumps(dataclasses.asdict(record)).encode()
            files.publish_bytes(self._progress_file(shard), data)

    @contextmanager
    def _unless_completed(self) -> Iterator[None]:
        """Forgive what can't be written because another wrote the same, and tidied the complete cache."""
        try:
            yield
        except WriteError:
            if not self.completed_by_another():
                raise

    def statistics(self, measure: Callable[[], Mapping[str, Statistics]]) -> dict[str, Statistics]:
        """The statistics by which this cache's states are standardised; empty where no codec needs any.

        Args:
            measure: called if the cache has none yet. Of several processes that measure, the first to publish
                decides for all.

        Raises:
            CacheError: shards were written with other statistics, and those are lost.
        """
        identity, path = self.manifest.identity, self.path / STATISTICS
        if not self._standardised:
            return {}
        if files.plain_size(path) < 0:
            data = b"".join(statistics_bytes(measure()))
            # Asked in this order: where another process wrote shards meanwhile, its file came before them.
            if self._others_than(hashlib.sha256(data).hexdigest()) and files.plain_size(path) < 0:
                raise CacheError(
                    f"{path} is lost and what is measured here differs from it, so the shards that are there "
                    "can't be read: remove the cache and run the same command again"
                )
            with self._unless_completed():
                files.publish_bytes(path, data, replace=False)
        found = read_statistics(self.path, identity)
        self._statistics = files.sha256_file(path)
        if self._others_than(self._statistics):
            raise self._damaged_statistics()
        return found

    def _others_than(self, digest: str) -> bool:
        """Whether the first shard that is there was written with statistics of another hash.

        Every process asks this, so the others are left to `finalise`, which reads all records anyway.
        """
        first = next(filter(None, map(self._record, range(len(self.manifest.plan)))), None)
        return first is not None and first.statistics != digest

    def _damaged_statistics(self) -> CacheError:
        return CacheError(
            f"{self.path / STATISTICS} is damaged (its hash is not that of what shards were written with): "
            "remove it, then run the same command again"
        )

    def statistics_written(self) -> bool:
        """Whether the statistics are there, by whichever process, or none are needed."""
        return not self._standardised or files.plain_size(self.path / STATISTICS) >= 0

    def _statistics_record(self) -> list[FileRecord]:
        if not self._standardised:
            return []
        path = self.path / STATISTICS
        size = files.plain_size(path)
        if size < 0:
            raise CacheError(f"{path} is lost: run the same command again")
        return [FileRecord(file=STATISTICS, bytes=size, sha256=files.sha256_file(path))]

    def _target_record(self) -> TargetRecord | None:
        """The record of a published `target/` whose files are still as large as they were."""
        record = read_target_record(self.progress)
        return record if record and all(map(self._is_there, record.files)) else None

    def _is_there(self, record: FileRecord) -> bool:
        return 0 <= record.bytes == files.plain_size(self.path / record.file)

    def target_written(self) -> bool:
        """Whether `target/` is finished, by whichever process."""
        return self._target_record() is not None

    def write_target(
        self,
        others: Mapping[str, bytes],
        frozen: Mapping[str, Tensor] | memoryview,
        proof: dict[str, float] | None = None,
    ) -> None:
        """Write `target/`: config and tokenizer files by name, and the frozen embedding and head.

        Args:
            frozen: `embed_tokens.weight` and, unless tied, `lm_head.weight`, `[V, H]` on the CPU; or the
                whole file that holds them.
            proof: what the proof before the first shard measured.
        """
        records = []
        with self._unless_completed():
            for name, data in sorted(others.items()):
                size, digest = files.publish_bytes(self.path / "target" / name, data)
                records.append(FileRecord(file=f"target/{name}", bytes=size, sha256=digest))
            pieces = [frozen] if isinstance(frozen, memoryview) else file_bytes(frozen)
            size, digest = files.publish_bytes(self.path / FROZEN, *pieces)
            records.append(FileRecord(file=FROZEN, bytes=size, sha256=digest))
            record = TargetRecord(files=tuple(records), proof=proof or {})
            files.publish_bytes(self.progress / TARGET, json.dumps(dataclasses.asdict(record)).encode())

    def finalise(self) -> Manifest | None:
        """Publish the complete manifest if every shard and `target/` are written; None if not yet."""
        shards = []
        for shard in range(len(self.manifest.plan)):
            record = self._record(shard)
            if record is None:
                return self.manifest if self.completed_by_another() else None
            shards.append(record)
        target = self._target_record()
        if target is None:
            return self.manifest if self.completed_by_another() else None
        statistics = self._statistics_record()
        if any(each.sha256 != r.statistics for each in statistics for r in shards):
            raise self._damaged_statistics()
        fidelity = self.manifest.fidelity or target.proof | summarise(r.measured for r in shards)
        self.manifest = dataclasses.replace(
            self.manifest,
            status="complete",
            fidelity=fidelity,
            shards=ShardFiles(bytes=tuple(r.bytes for r in shards), sha256=tuple(r.sha256 for r in shards)),
            files=(self._index, *statistics, *target.files),
        )
        write_manifest(self.path, self.manifest)
        self._remove_progress()
        return self.manifest

    def _remove_progress(self) -> None:
        """Tidy a complete cache: no progress, and nothing that a killed process of any machine left."""
        if self.progress.is_dir():
            with suppress(OSError):  # gone already, or not ours to remove: no reader looks at it
                self.progress.rename(Path(tempfile.mkdtemp(prefix=_DONE, dir=self.path)))
        for done in self.path.glob(f"{_DONE}*"):
            shutil.rmtree(done, ignore_errors=True)
        for folder in (self.path / "shards", self.path / "target"):
            for path in folder.glob(".*.partial"):
                with suppress(OSError):
                    path.unlink()
