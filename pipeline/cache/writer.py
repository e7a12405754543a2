"""Write a cache: the plan, then shards in any order by any number of processes, then the complete manifest.

Every file is published atomically, and a shard's record in `progress/` only after the shard. So a capture
killed at any moment continues with the shards that have no record.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import MappingProxyType

import numpy as np
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
    FileRecord,
    Identity,
    Manifest,
    Plan,
    ShardFiles,
    ShardPlan,
    read_manifest,
    shard_file,
    write_manifest,
)
from pipeline.cache.progress.claims import Worker
from pipeline.cache.progress.records import TARGET, Records, ShardRecord, TargetRecord
from pipeline.cache.progress.shared_statistics import SharedStatistics
from pipeline.cache.prompts import answers_file, has_tokens, is_answered
from pipeline.cache.same import origin, refuse_another
from pipeline.cache.shard import ShardBuffer, file_bytes, file_layout, shard_buffer
from pipeline.cache.skipped import (
    ByReason,
    Skipped,
    all_skipped,
    counted,
    reasons_by_row,
    skipped_samples,
    uncounted,
)
from pipeline.cache.statistics import standardised_states
from pipeline.errors import CacheError, WriteError

_FOLDERS = ("shards", PROGRESS, "target")


class CacheWriter:
    """Writes one cache by one plan. Several processes may do so at once.

    Args:
        path: the cache directory; created if missing, continued if it holds the same identity.
        identity: everything that decides the cache's bytes.
        plan: the contents of each shard, from `build_index`.
        index: the sample index, from `build_index`.
        rows: counts of source rows: read, captured, and dropped by reason.
        history: the caches this one is converted from, the first one first.

    Raises:
        CacheError: the directory holds another identity, whose differing fields are named, or other files.
        WriteError: the directory can't be written to.
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
        self._records = Records(path, bool(standardised_states(identity)), plan.samples)
        self._statistics = SharedStatistics(path, identity, self._records, len(plan))
        self._table = index
        self.manifest = Manifest(
            created_by=f"dspark-pipeline {__version__}",
            identity=identity,
            rows=rows,
            plan=plan,
            fidelity={},
            history=history,
        )
        if path.is_symlink() and not path.exists():
            raise CacheError(f"expected a directory, {path} is a link to nothing: name another")
        if path.exists() and not path.is_dir():
            raise CacheError(f"expected a directory, {path} is a file: name a new directory or a cache")
        try:
            if not (path / MANIFEST).exists():
                self._start()
            self._join(index)
        except OSError as error:
            raise files.write_error(error.filename or path, error) from error

    def _start(self) -> None:
        if self.path.exists():
            files.remove_partials(self.path)  # of a capture killed while it wrote its first file
        self.path.mkdir(parents=True, exist_ok=True)
        strangers = [entry for entry in self.path.iterdir() if not entry.name.endswith(".partial")]
        if (self.path / MANIFEST).exists():  # another process has just started
            return
        if strangers:
            raise CacheError(
                f"{self.path} is not empty and holds no {MANIFEST}: choose an empty or new directory"
            )
        # Keeps an existing one: this process may have paused here while others did the whole capture.
        files.publish_bytes(self.path / MANIFEST, self.manifest.to_json(), replace=False)

    def _join(self, index: pa.Table) -> None:
        """Open a directory that has a manifest: a complete cache, or one to be continued."""
        for folder in (self.path / name for name in _FOLDERS):
            if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
                raise CacheError(f"{folder} is not a directory but a link or a file: remove it")
        found = read_manifest(self.path)
        if is_answered(found, self.manifest.identity) and not self._damaged(found):
            self._finish(found)  # other processes answered all prompts since this one looked at the directory
            return
        option = "directory" if self.manifest.history else "--cache"  # the command's word for it
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
                self._finish(found)
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
        if again.status == "complete":  # another process has just finished it
            self._finish(again)
            return
        files.remove_partials(self.path)
        self._records.read_kept(len(self.manifest.plan))
        if not self.manifest.identity.data.of_prompts:  # it may exist already, settled by another process
            self._write_index(index_bytes(index))

    def _finish(self, found: Manifest) -> None:
        """Take the manifest of the complete cache, and remove what only an incomplete one has."""
        self.manifest = found
        self._records.remove()

    def _damaged(self, manifest: Manifest) -> set[str]:
        """Return the files of a complete cache that are missing or have the wrong size."""
        return {record.file for record in manifest.all_files() if not self._records.matches(record)}

    def _reopen(self, found: Manifest, damaged: set[str]) -> None:
        """Turn a complete but damaged cache back into an incomplete one that keeps its good shards."""
        self._records.publish_kept(found, damaged)
        # A rewritten shard has the same bytes, so the measured fidelity stays true.
        self.manifest = dataclasses.replace(
            found,
            status="incomplete",
            rows=uncounted(found.rows, found.skipped),
            shards=ShardFiles(),
            files=(),
            skipped=Skipped(),
            tensors={},
        )
        write_manifest(self.path, self.manifest)

    def _write_index(self, data: bytes) -> None:
        path, digest = self.path / INDEX, hashlib.sha256(data).hexdigest()
        if files.plain_size(path) != len(data) or files.sha256_file(path) != digest:
            files.publish_bytes(path, data)
        self._index = FileRecord(file=INDEX, bytes=len(data), sha256=digest)

    @property
    def complete(self) -> bool:
        """True once the cache is complete."""
        return self.manifest.status == "complete"

    def completed_by_another(self) -> bool:
        """Return whether the cache is complete by now; if another process finished it, take its manifest."""
        if not self.complete:
            found = read_manifest(self.path)
            if found.status == "complete":
                self.manifest = found
        return self.complete

    def pending(self) -> list[int]:
        """Return the shards still to be written, in order."""
        if self.complete or (not self.progress.is_dir() and self.completed_by_another()):
            return []
        return [shard for shard in range(len(self.manifest.plan)) if not self.written(shard)]

    def written(self, shard: int) -> bool:
        """Return whether a shard is finished, by any process."""
        return self._records.shard(shard) is not None

    def new_shard(
        self, shard: int, memory: Tensor | None = None, plan: ShardPlan | None = None
    ) -> ShardBuffer:
        """Return a shard to be filled.

        Args:
            memory: as in `pipeline.cache.shard.shard_buffer`.
            plan: what it holds, where that is less than was planned, see `settle`.
        """
        return shard_buffer(shard_specs(self.manifest.identity, plan or self.manifest.plan[shard]), memory)

    def holds(self, shard: int, input_ids: np.ndarray) -> bool:
        """Return whether a written shard has these token ids, `[T]`."""
        return has_tokens(self.path / shard_file(shard), input_ids)

    def answers(self, shard: int) -> Path:
        """Return the file of the answers that a written shard holds; missing once they are settled."""
        return answers_file(self.path, shard)

    def forget(self, shards: Iterable[int]) -> None:
        """Make written shards pending again."""
        for shard in shards:
            self._records.remove_shard(shard)

    def settle(self, content: str, plan: Plan, index: pa.Table) -> None:
        """Replace a plan of prompts by that of the samples which they became. `finalise` must follow.

        Args:
            content: hash of the samples.
            plan: with as many samples in every shard as before.
            index: of the samples.
        """
        identity = self.manifest.identity
        identity = dataclasses.replace(identity, data=dataclasses.replace(identity.data, sha256=content))
        self.manifest = dataclasses.replace(self.manifest, identity=identity, plan=plan)
        self._table = index
        self._write_index(index_bytes(index))

    def shard_bytes(self, shard: int) -> int:
        """Return the size of a shard's file."""
        return file_layout(shard_specs(self.manifest.identity, self.manifest.plan[shard])).size

    def write_shard(
        self,
        shard: int,
        buffer: ShardBuffer,
        measured: Measured | None = None,
        step: Callable[[str], AbstractContextManager] = nullcontext,
        skipped: ByReason = MappingProxyType({}),
    ) -> None:
        """Publish one shard, then its record.

        Args:
            buffer: from `new_shard(shard)`, filled.
            measured: figures of some of its rows, see `pipeline.cache.fidelity`.
            step: as in `pipeline.files.publish_bytes`.
            skipped: its samples that no reader shall return, whose states are zero bytes: by reason, their
                numbers in the shard in order.

        Raises:
            WriteError: the file can't be written; nothing of it remains.
        """
        name = shard_file(shard)
        if self.written(shard):  # by another process that held it too
            return
        with self._unless_completed():
            size, digest = files.publish_bytes(self.path / name, buffer.bytes(), step=step)
            record = ShardRecord(
                file=name,
                bytes=size,
                sha256=digest,
                measured=measured or {},
                statistics=self._statistics.sha256,
                skipped={reason: tuple(numbers) for reason, numbers in skipped.items()},
            )
            self._records.publish(f"{shard:05d}.json", record)

    @contextmanager
    def _unless_completed(self) -> Iterator[None]:
        """Ignore a WriteError in the block if another process has completed the cache meanwhile."""
        try:
            yield
        except WriteError:
            if not self.completed_by_another():
                raise

    def statistics(self, measure: Callable[[], Mapping[str, Statistics]]) -> dict[str, Statistics]:
        """Return the statistics of this cache by state; empty if no codec needs any.

        Args:
            measure: called if the cache has none yet. If several processes measure, the first to publish
                decides for all.

        Raises:
            CacheError: shards were written with other statistics, which are lost or damaged.
        """
        return self._statistics.read(measure, self._unless_completed)

    def statistics_written(self) -> bool:
        """Return whether the statistics are published, by any process, or none are needed."""
        return self._statistics.written()

    def target_written(self) -> bool:
        """Return whether `target/` is finished, by any process."""
        return self._records.target() is not None

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
            proof: figures of the proof before the first shard.
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
            self._records.publish(TARGET, record)

    def skipped(self) -> dict[int, str]:
        """Return the reason of each sample that finished shards skip, by its row of the index.

        Reads every record: call it rarely.
        """
        records = map(self._records.shard, range(len(self.manifest.plan)))
        return reasons_by_row((r.skipped if r else {} for r in records), self.manifest.plan.samples)

    def finalise(self, check: Callable[[dict[int, str]], None] = lambda skipped: None) -> Manifest | None:
        """Publish the complete manifest and return it; None while a shard or `target/` is not written.

        Args:
            check: called with the result of `skipped` before; raises to leave the cache incomplete.

        Raises:
            CacheError: every sample is skipped, or the statistics are lost or damaged.
        """
        records = [self._records.shard(shard) for shard in range(len(self.manifest.plan))]
        shards, target = [record for record in records if record is not None], self._records.target()
        # Of prompts: another process wrote the last shard a moment ago, and settles what this one has not.
        unsettled = self.manifest.identity.data.of_prompts
        if target is None or len(shards) < len(records) or unsettled:
            return self.manifest if self.completed_by_another() else None
        statistics = self._statistics.finished(shards)
        reasons = reasons_by_row((r.skipped for r in shards), self.manifest.plan.samples)
        check(reasons)
        if len(reasons) == sum(self.manifest.plan.samples):
            raise all_skipped(self.path, reasons)
        skipped = skipped_samples(reasons, self._table)
        fidelity = self.manifest.fidelity or target.proof | summarise(r.measured for r in shards)
        self.manifest = dataclasses.replace(
            self.manifest,
            status="complete",
            fidelity=fidelity,
            rows=counted(self.manifest.rows, skipped),
            skipped=skipped,
            shards=ShardFiles(bytes=tuple(r.bytes for r in shards), sha256=tuple(r.sha256 for r in shards)),
            files=(self._index, *statistics, *target.files),
        )
        self._publish(shards)
        return self.manifest

    def _publish(self, shards: list[ShardRecord]) -> None:
        """Publish the complete manifest."""
        write_manifest(self.path, self.manifest)
        self._finish(self.manifest)

    def worker(self, label: str = "") -> Worker:
        """Return this process as a worker on the cache. See `Worker`."""
        return Worker(self.progress, label)
