"""Write a cache: plan, then shards in any order, then the complete manifest.

Every file is published atomically, and a shard's record under `progress/` only after the shard, so
that a capture killed at any moment continues with the shards that have no record.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pyarrow as pa
from safetensors.torch import save_file
from torch import Tensor

from pipeline import __version__, config, files
from pipeline.cache.index import index_bytes
from pipeline.cache.layout import shard_specs
from pipeline.cache.manifest import (
    FROZEN,
    INDEX,
    MANIFEST,
    FileRecord,
    Identity,
    Manifest,
    Plan,
    ShardFiles,
    differing_fields,
    read_manifest,
    shard_file,
    write_manifest,
)
from pipeline.errors import CacheError, ConfigError


class CacheWriter:
    """Fills one cache directory according to one plan.

    Args:
        path: the cache directory; made if missing, continued if it holds the same identity.
        identity: what decides the cache's bytes.
        plan: what each shard holds, from `build_index`.
        index: the sample index, from `build_index`.
        rows: where every source row went, by reason.

    Raises:
        CacheError: the directory holds another identity (the fields that differ are named), or
            files that are no cache.
    """

    def __init__(
        self,
        path: Path,
        identity: Identity,
        plan: Plan,
        index: pa.Table,
        rows: dict[str, int],
    ):
        self.path = path
        self._target: list[FileRecord] = []
        self.manifest = Manifest(
            created_by=f"dspark-pipeline {__version__}", identity=identity, rows=rows, plan=plan, fidelity={}
        )
        if path.exists() and not path.is_dir():
            raise CacheError(f"{path} is a file: --cache must name a directory, new or holding a cache")
        if not (path / MANIFEST).exists():
            self._start(index)
            return
        found = read_manifest(path)
        differing = differing_fields(found.identity, identity)
        if differing:
            raise CacheError(
                f"{path} holds another capture ({'; '.join(differing)}): "
                "choose another --cache, or remove that directory"
            )
        self.manifest = dataclasses.replace(self.manifest, status=found.status, created_by=found.created_by)
        if found.status == "complete":
            damaged = self._damaged(found)
            if not damaged:
                self.manifest = found
                return
            self._reopen(found, damaged)
        self._write_index(index)

    def _damaged(self, manifest: Manifest) -> set[str]:
        """Files of a complete cache that are missing or have another size than they should."""

        def size(name: str) -> int:
            path = self.path / name
            return path.stat().st_size if path.is_file() and not path.is_symlink() else -1

        return {record.file for record in manifest.all_files() if size(record.file) != record.bytes}

    def _reopen(self, found: Manifest, damaged: set[str]) -> None:
        """Turn a complete but damaged cache back into an incomplete one that keeps its good shards."""
        self.manifest = dataclasses.replace(
            found, status="incomplete", fidelity={}, shards=ShardFiles(), files=()
        )
        (self.path / "progress").mkdir(exist_ok=True)
        for shard, record in zip(range(len(found.plan)), found.all_files(), strict=False):
            if record.file not in damaged:
                self._write_progress(shard, record)
        for name in damaged:
            (self.path / name).unlink(missing_ok=True)
        write_manifest(self.path, self.manifest)

    def _start(self, index: pa.Table) -> None:
        if self.path.exists():
            files.remove_partials(self.path)  # a capture killed while it wrote its first file
        if self.path.exists() and any(self.path.iterdir()):
            raise CacheError(
                f"{self.path} is not empty and holds no {MANIFEST}: choose an empty or new --cache directory"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        write_manifest(self.path, self.manifest)
        self._write_index(index)

    def _write_index(self, index: pa.Table) -> None:
        for folder in ("shards", "progress", "target"):
            (self.path / folder).mkdir(exist_ok=True)
            files.remove_partials(self.path / folder)
        files.remove_partials(self.path)
        size, digest = files.publish_bytes(self.path / INDEX, index_bytes(index))
        self._index = FileRecord(file=INDEX, bytes=size, sha256=digest)

    @property
    def complete(self) -> bool:
        """Whether the cache is finished."""
        return self.manifest.status == "complete"

    def pending(self) -> list[int]:
        """The shards still to be written, in order."""
        return [shard for shard in range(len(self.manifest.plan)) if self._record(shard) is None]

    def _progress_file(self, shard: int) -> Path:
        return self.path / "progress" / f"{shard:05d}.json"

    def _record(self, shard: int) -> FileRecord | None:
        """The record of a published shard whose file is still as large as it was."""
        try:
            values = json.loads(self._progress_file(shard).read_bytes())
            record = config.build(FileRecord, values)
            size = (self.path / shard_file(shard)).stat().st_size
        except (OSError, ValueError, RecursionError, ConfigError):
            return None  # never finished, or damaged since: it is written again
        return record if (record.file, record.bytes) == (shard_file(shard), size) else None

    def write_shard(self, shard: int, tensors: dict[str, Tensor]) -> None:
        """Publish one shard. The tensors must be exactly those of the plan, on the CPU."""
        specs = shard_specs(self.manifest.identity, self.manifest.plan[shard])
        got = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        assert got == specs, f"shard {shard} does not follow the plan"
        name = shard_file(shard)
        size, digest = files.publish(self.path / name, lambda partial: save_file(tensors, str(partial)))
        self._write_progress(shard, FileRecord(file=name, bytes=size, sha256=digest))

    def _write_progress(self, shard: int, record: FileRecord) -> None:
        data = json.dumps(dataclasses.asdict(record)).encode()
        files.publish_bytes(self._progress_file(shard), data)

    def write_target(self, others: dict[str, bytes], frozen: dict[str, Tensor]) -> None:
        """Write `target/`: config and tokenizer files by name, and the frozen embedding and head."""

        def record(name: str, published: tuple[int, str]) -> FileRecord:
            return FileRecord(file=name, bytes=published[0], sha256=published[1])

        self._target = [
            record(f"target/{name}", files.publish_bytes(self.path / "target" / name, others[name]))
            for name in sorted(others)
        ]
        weights = files.publish(self.path / FROZEN, lambda partial: save_file(frozen, str(partial)))
        self._target.append(record(FROZEN, weights))

    def finalise(self, fidelity: dict[str, float]) -> Manifest:
        """Publish the complete manifest. Every shard and `target/` must have been written."""
        shards = []
        for shard in range(len(self.manifest.plan)):
            record = self._record(shard)
            if record is None:
                raise CacheError(f"{self.path}: shard {shard} is not written yet; run the capture again")
            shards.append(record)
        assert self._target, "write_target comes first"
        self.manifest = dataclasses.replace(
            self.manifest,
            status="complete",
            fidelity=fidelity,
            shards=ShardFiles(bytes=tuple(r.bytes for r in shards), sha256=tuple(r.sha256 for r in shards)),
            files=(self._index, *self._target),
        )
        write_manifest(self.path, self.manifest)
        shutil.rmtree(self.path / "progress", ignore_errors=True)
        return self.manifest
