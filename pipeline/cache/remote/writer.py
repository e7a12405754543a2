"""Write a cache to an object store, shard by shard, from a staging directory of this machine.

The staging directory is an incomplete cache like any other. A shard is uploaded as soon as it is written
there, then its record in `progress/`, and the shard's file goes. The complete manifest is uploaded last. So
this machine holds the shards in flight only, and a capture killed at any moment continues, on any machine.

Where the capture answers prompts first, a shard's answers are uploaded before it. Two processes that answered
one shard wrote different bytes: only the owner of its claim uploads it, and its record has the store's tag of
the bytes that it is of.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from threading import Condition
from types import MappingProxyType

import numpy as np
import pyarrow as pa
from torch import Tensor

from pipeline import files
from pipeline.cache.codecs import Statistics
from pipeline.cache.fidelity import Measured
from pipeline.cache.layout import shard_specs
from pipeline.cache.manifest import (
    INDEX,
    MANIFEST,
    PROGRESS,
    STATISTICS,
    Identity,
    Manifest,
    Plan,
    is_sha256,
    parse_manifest,
    shard_file,
)
from pipeline.cache.optional import plain_values
from pipeline.cache.progress.claims import claim_name
from pipeline.cache.progress.records import TARGET, ShardRecord, read_target_record
from pipeline.cache.prompts import answers_file, held_plan, is_answered
from pipeline.cache.remote.claims import RemoteWorker
from pipeline.cache.same import origin, refuse_another
from pipeline.cache.shard import ShardBuffer, map_shard, tensor_hashes
from pipeline.cache.skipped import ByReason
from pipeline.cache.writer import CacheWriter
from pipeline.errors import CacheError
from pipeline.remote.objects import MissingObjectError, Objects, StoreError

# Seconds for which a listing of the finished shards counts as current.
_LISTED_S = 5.0


class _TakenOverError(StoreError):
    """Another process owns a shard by now, or has completed the cache."""


class RemoteWriter(CacheWriter):
    """Writes one cache to an object store. See `CacheWriter`, whose interface it has.

    Args:
        objects: the place of the cache.
        staging: directory of this machine, for the files in flight.
        staging_bytes: most bytes of shards that this process has there at once; one shard always fits.
        history: as for `CacheWriter`.

    Raises:
        CacheError: the place or the staging directory holds another cache, or other files.
        StoreError: the place can't be read or written.
    """

    def __init__(
        self,
        objects: Objects,
        staging: Path,
        identity: Identity,
        plan: Plan,
        index: pa.Table,
        rows: dict[str, int],
        staging_bytes: int | None = None,
        history: tuple[dict[str, str], ...] = (),
    ):
        self.objects = objects
        self._most, self._staged, self._room = staging_bytes, 0, Condition()
        self._listed = float("-inf")
        self._worker: RemoteWorker | None = None
        super().__init__(staging, identity, plan, index, rows, history)
        found = self._begin()
        if is_answered(found, identity):  # by other processes, since this one looked at the place
            self._take(found)
            return
        refuse_another(objects.address, found.identity, identity)
        if found.plan != plan:
            raise CacheError(
                f"{objects.address} has another plan: choose another --cache, or remove what is there"
            )
        if found.history != history:
            raise CacheError(
                f"{objects.address} was {origin(found.history)}, not {origin(history)}: choose another "
                "place, or remove what is there"
            )
        if found.status == "complete":
            self._require_files(found)
            self._take(found)
            return
        self.manifest = dataclasses.replace(self.manifest, created_by=found.created_by)
        self._pull()
        self._forget_lost()
        if identity.data.of_prompts:  # an answered shard needs its claim: the files here are written anew
            return
        for shard in range(len(plan)):  # written here by a process that was killed before it uploaded them
            if super().written(shard) and shard_file(shard) not in self._records.elsewhere:
                self._forward(shard)

    def _begin(self) -> Manifest:
        """Return the place's manifest; begin a cache there if it is empty."""
        for again in (False, True):
            try:
                return parse_manifest(self.objects.read(MANIFEST), self.objects.url(MANIFEST))
            except MissingObjectError:
                if next(self.objects.list(), None) is None:
                    # Or another process has just begun.
                    self.objects.create(MANIFEST, self.manifest.to_json())
                elif again:
                    raise CacheError(
                        f"{self.objects.address} is not empty and holds no {MANIFEST}: choose another place"
                    ) from None
        return parse_manifest(self.objects.read(MANIFEST), self.objects.url(MANIFEST))

    def _pull(self) -> None:
        """Take over the records of what is finished in the object store."""
        self._listed = time.monotonic()
        for entry in self.objects.list(PROGRESS):
            name = entry.name.rpartition("/")[2]
            stem = name.removesuffix(".json")
            shard = int(stem) if stem.isdecimal() else len(self.manifest.plan)
            known = shard >= len(self.manifest.plan) or shard_file(shard) in self._records.elsewhere
            if name == TARGET or not known:
                self._pull_record(name)

    def _forget_lost(self) -> None:
        """Make shards pending again whose objects are gone or have another size, whatever records say."""
        sizes = {entry.name: entry.bytes for entry in self.objects.list("shards")}
        for shard in range(len(self.manifest.plan)):
            record = self._records.shard(shard)
            lost = record is not None and sizes.get(record.file) != record.bytes
            if lost and record.file in self._records.elsewhere:
                self._records.elsewhere.discard(record.file)
                self.objects.remove([f"{PROGRESS}/{shard:05d}.json"])

    def _pull_record(self, name: str) -> None:
        try:
            data = self.objects.read(f"{PROGRESS}/{name}")
        except MissingObjectError:  # just removed
            if name != TARGET:
                self._records.elsewhere.discard(shard_file(int(name.removesuffix(".json"))))
            return
        self.progress.mkdir(exist_ok=True)
        files.publish_bytes(self.progress / name, data)
        if name == TARGET:
            target = read_target_record(self.progress)
            self._records.elsewhere.update(each.file for each in (target.files if target else ()))
            return
        shard = int(name.removesuffix(".json"))
        self._records.elsewhere.add(shard_file(shard))
        record = self._records.shard(shard)
        names = shard_specs(self.manifest.identity, self.manifest.plan[shard]).keys()
        whole = record is not None and record.tensors.keys() == names
        if record is None or not whole or not all(map(is_sha256, record.tensors.values())):
            self._records.elsewhere.discard(shard_file(shard))  # damaged: the shard is written again

    def _take(self, found: Manifest) -> None:
        """Take the complete cache in the object store, and remove what only an incomplete one needs."""
        self.manifest = found
        self.objects.remove([entry.name for entry in self.objects.list(PROGRESS)])
        shutil.rmtree(self.path, ignore_errors=True)

    def _require_files(self, found: Manifest) -> None:
        """Raise CacheError unless all files of a complete cache are there, with their sizes."""
        sizes = {entry.name: entry.bytes for entry in self.objects.list()}
        for record in found.all_files():
            if sizes.get(record.file) != record.bytes:
                raise CacheError(
                    f"{self.objects.url(record.file)} is missing or damaged: copy it there again from a copy "
                    f"of the cache, by `dspark sync COPY {self.objects.address}`"
                )

    def completed_by_another(self) -> bool:
        if not self.complete:
            found = parse_manifest(self.objects.read(MANIFEST), self.objects.url(MANIFEST))
            if found.status == "complete":
                self._take(found)
        return self.complete

    def pending(self) -> list[int]:
        if self.completed_by_another():
            return []
        self._pull()
        return [shard for shard in range(len(self.manifest.plan)) if not self._finished(shard)]

    def _finished(self, shard: int) -> bool:
        """Return whether a shard is finished, as far as this process knows."""
        uploaded = shard_file(shard) in self._records.elsewhere
        return super().written(shard) and (uploaded or not self.manifest.identity.data.of_prompts)

    def written(self, shard: int) -> bool:
        if self.complete or self._finished(shard):
            return True
        if time.monotonic() - self._listed > _LISTED_S:
            self._pull()
        return self._finished(shard)

    def write_shard(
        self,
        shard: int,
        buffer: ShardBuffer,
        measured: Measured | None = None,
        step: Callable[[str], AbstractContextManager] = nullcontext,
        skipped: ByReason = MappingProxyType({}),
    ) -> None:
        size = len(buffer.memory)
        with self._room:
            self._room.wait_for(lambda: not self._staged or self._staged + size <= (self._most or math.inf))
            self._staged += size
        try:
            super().write_shard(shard, buffer, measured, step, skipped)
            if shard_file(shard) not in self._records.elsewhere:
                with step("write"):
                    self._forward(shard)
        finally:
            with self._room:
                self._staged -= size
                self._room.notify_all()

    def _forward(self, shard: int) -> None:
        """Upload a shard of the staging directory, then its record, and remove its file."""
        record, path, name = self._records.shard(shard), self.path / shard_file(shard), f"{shard:05d}.json"
        if record is None:  # another process of this machine has just done it, or completed the cache
            return
        try:
            identity, answers = self.manifest.identity, answers_file(self.path, shard)
            specs = shard_specs(identity, held_plan(path, identity, self.manifest.plan[shard]))
            hashes = tensor_hashes(map_shard(path, specs).tensors)
            require_own = functools.partial(self._require_own, shard)
            if answers.exists():
                self.objects.write(f"{PROGRESS}/{answers.name}", answers, require_own)
            tag = self.objects.write(record.file, path, require_own) or self.objects.tag(record.file)
            record = dataclasses.replace(record, tensors=hashes, tag=tag)
        except _TakenOverError:
            path.unlink(missing_ok=True)
            return
        except (CacheError, StoreError):
            self._pull_record(name)
            known = not path.exists() and shard_file(shard) in self._records.elsewhere
            if not known and not self.completed_by_another():
                raise
            return  # likewise
        self._records.publish(name, record)
        self._records.elsewhere.add(shard_file(shard))
        self.objects.write(f"{PROGRESS}/{name}", json.dumps(plain_values(record)).encode())
        path.unlink(missing_ok=True)

    def _require_own(self, shard: int) -> None:
        """Raise _TakenOverError if this process answers prompts, and no longer owns a shard."""
        if not self.manifest.identity.data.of_prompts:
            return
        self._pull_record(f"{shard:05d}.json")
        own = self._worker is not None and self._worker.owns(claim_name(shard))
        finished = shard_file(shard) in self._records.elsewhere
        if not own or finished or self.completed_by_another():
            raise _TakenOverError(f"{self.objects.url(shard_file(shard))} is another process's by now")

    def answers(self, shard: int) -> Path:
        path = super().answers(shard)
        if shard_file(shard) in self._records.elsewhere:
            with contextlib.suppress(MissingObjectError), self._unless_completed():
                files.publish_bytes(path, self.objects.read(f"{PROGRESS}/{path.name}"))
        return path

    def holds(self, shard: int, input_ids: np.ndarray) -> bool:
        self._pull_record(f"{shard:05d}.json")  # it may have been written again, or be gone
        record = self._records.shard(shard)
        if record is None or record.file not in self._records.elsewhere:
            return False
        try:
            tag = self.objects.tag(record.file)
        except MissingObjectError:
            return False
        digest = hashlib.sha256(input_ids.astype("<i4")).hexdigest()
        same = not tag or not record.tag or tag == record.tag
        return same and record.tensors.get("input_ids") == digest

    def forget(self, shards: Iterable[int]) -> None:
        for shard in shards:
            name, path = f"{PROGRESS}/{shard:05d}.json", self.progress / f"{shard:05d}.json"
            with contextlib.suppress(MissingObjectError):
                # Not one that another process has just written.
                if path.exists() and self.objects.read(name) == path.read_bytes():
                    self.objects.remove([name])
            self._records.elsewhere.discard(shard_file(shard))
            super().forget([shard])

    def statistics(self, measure: Callable[[], Mapping[str, Statistics]]) -> dict[str, Statistics]:
        self._pull_statistics()
        found = super().statistics(measure)
        path = self.path / STATISTICS
        if found and not self.objects.create(STATISTICS, path.read_bytes()):
            self._pull_statistics()  # of the process that was first
            found = super().statistics(measure)
        return found

    def _pull_statistics(self) -> None:
        try:
            data = self.objects.read(STATISTICS)
        except MissingObjectError:
            return
        path = self.path / STATISTICS
        if files.plain_size(path) != len(data) or path.read_bytes() != data:
            files.publish_bytes(path, data)

    def statistics_written(self) -> bool:
        if super().statistics_written():
            return True
        self._pull_statistics()
        return super().statistics_written()

    def target_written(self) -> bool:
        if self.complete or super().target_written():
            return True
        self._pull_record(TARGET)
        return super().target_written()

    def write_target(
        self,
        others: Mapping[str, bytes],
        frozen: Mapping[str, Tensor] | memoryview,
        proof: dict[str, float] | None = None,
    ) -> None:
        super().write_target(others, frozen, proof)
        record = self._records.target()
        assert record is not None
        for each in record.files:
            self.objects.write(each.file, self.path / each.file)
        self.objects.write(f"{PROGRESS}/{TARGET}", json.dumps(plain_values(record)).encode())

    def finalise(self, check: Callable[[dict[int, str]], None] = lambda skipped: None) -> Manifest | None:
        if self.completed_by_another():
            return self.manifest
        self._pull()
        return super().finalise(check)

    def _publish(self, shards: list[ShardRecord]) -> None:
        columns = {name: tuple(record.tensors[name] for record in shards) for name in shards[0].tensors}
        self.manifest = dataclasses.replace(self.manifest, tensors=columns)
        try:
            self.objects.write(INDEX, self.path / INDEX)
        except StoreError:
            found = parse_manifest(self.objects.read(MANIFEST), self.objects.url(MANIFEST))
            if found.status != "complete":
                raise
            self._take(found)  # another process of this machine has just completed the cache
            return
        self.objects.write(MANIFEST, self.manifest.to_json())
        self._take(self.manifest)

    def worker(self, label: str = "") -> RemoteWorker:
        self._worker = RemoteWorker(self.objects, label)
        return self._worker
