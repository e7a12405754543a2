"""Copy a complete cache from one place to another: directories and object stores.

Every file is compared with its hash where it arrives, or before it leaves for an object store. A stopped copy
continues: it has its manifest last, like any cache.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline import files
from pipeline.cache.layout import shard_specs
from pipeline.cache.manifest import (
    MANIFEST,
    PROGRESS,
    FileRecord,
    Manifest,
    ShardFiles,
    parse_manifest,
    read_manifest,
)
from pipeline.cache.remote.local import default_store
from pipeline.cache.remote.mirror import REMEDY, fetch_file, read_remote_manifest
from pipeline.cache.same import refuse_another
from pipeline.cache.shard import map_shard, tensor_hashes
from pipeline.cache.skipped import Skipped
from pipeline.errors import CacheError
from pipeline.remote.address import Address, Place
from pipeline.remote.objects import MissingObjectError, Objects

_MARK = f"{PROGRESS}/sync.json"
"""File of an unfinished copy: the hash of its source's manifest."""


def sync(
    source: Place,
    destination: Place,
    begin: Callable[[int], object] = lambda total_bytes: None,
    progress: Callable[[int], object] = lambda done_bytes: None,
) -> tuple[Manifest, int]:
    """Copy a complete cache.

    A copy in an object store has the hashes of all tensors besides, so that readers need not fetch whole
    shards.

    Args:
        begin: called once with the bytes of the whole cache.
        progress: called with the bytes that are in place, since the last call.

    Returns:
        The copy's manifest, and the number of bytes copied.

    Raises:
        CacheError: the source is incomplete or damaged, or the destination holds something else.
        StoreError: an object store can't be read or written.
        WriteError: the destination can't be written to.
    """
    origin = Bucket(Objects(source)) if isinstance(source, Address) else _Directory(source)
    manifest = origin.manifest
    to: _Destination = (
        _ToBucket(Objects(destination)) if isinstance(destination, Address) else _ToDirectory(destination)
    )
    found = to.start(manifest)
    if found is not None:
        return found, 0
    begin(manifest.num_bytes)
    copied = 0
    for record in manifest.all_files():
        if not to.has(record):
            to.put(origin, record)
            copied += record.bytes
        progress(record.bytes)
    return to.finish(manifest), copied


class _Source(ABC):
    """A complete cache to copy from."""

    manifest: Manifest

    @abstractmethod
    def copy(self, record: FileRecord, path: Path) -> None:
        """Copy a file to an existing empty one."""

    @abstractmethod
    def name(self, record: FileRecord) -> str:
        """Return a file's path or URL, for messages."""

    def verified(self, record: FileRecord, path: Path) -> None:
        """Copy a file and compare its hash, twice if need be. Raises CacheError."""
        for _ in range(2):
            self.copy(record, path)
            if path.stat().st_size == record.bytes and files.sha256_file(path) == record.sha256:
                return
        raise CacheError(f"{self.name(record)} is damaged (its hash is another): {self.remedy}")

    remedy = "`dspark verify --repair` sets it aside, then capture again"


class _Directory(_Source):
    def __init__(self, cache: Path):
        self.cache, self.manifest = cache, read_manifest(cache)
        if self.manifest.status != "complete":
            raise CacheError(f"{cache} is incomplete: run the same capture again to finish it")

    def name(self, record: FileRecord) -> str:
        return str(self.cache / record.file)

    def copy(self, record: FileRecord, path: Path) -> None:
        if files.plain_size(self.cache / record.file) != record.bytes:
            raise CacheError(f"{self.name(record)} is missing or has another size: {self.remedy}")
        shutil.copyfile(self.cache / record.file, path)


class Bucket(_Source):
    """A complete cache in an object store."""

    remedy = REMEDY

    def __init__(self, objects: Objects):
        self.objects = objects
        self.manifest, _ = read_remote_manifest(objects)

    def name(self, record: FileRecord) -> str:
        return self.objects.url(record.file)

    def copy(self, record: FileRecord, path: Path) -> None:
        fetch_file(self.objects, record, path)


class _Destination(ABC):
    @abstractmethod
    def start(self, manifest: Manifest) -> Manifest | None:
        """Take the place for a copy; return the manifest of one that is complete already."""

    @abstractmethod
    def has(self, record: FileRecord) -> bool:
        """Return whether a file was copied before."""

    @abstractmethod
    def put(self, origin: _Source, record: FileRecord) -> None:
        """Copy a file."""

    @abstractmethod
    def finish(self, manifest: Manifest) -> Manifest:
        """Make the copy complete; return its manifest."""


class _ToDirectory(_Destination):
    def __init__(self, cache: Path):
        self.cache = cache

    def start(self, manifest: Manifest) -> Manifest | None:
        mark = json.dumps({"manifest": _digest(manifest)}).encode()
        if (self.cache / MANIFEST).exists():
            return _complete(self.cache, read_manifest(self.cache), manifest)
        try:
            if not (self.cache / _MARK).exists():
                files.check_new(self.cache)
            elif files.read_small(self.cache / _MARK, 4096) != mark:
                raise CacheError(
                    f"{self.cache} holds the beginning of a copy of another cache: choose another destination"
                )
            for folder in ("shards", "target", PROGRESS):
                (self.cache / folder).mkdir(parents=True, exist_ok=True)
                files.remove_partials(self.cache / folder)
            files.publish_bytes(self.cache / _MARK, mark)
        except OSError as error:
            raise files.write_error(self.cache, error) from error
        return None

    def has(self, record: FileRecord) -> bool:
        path = self.cache / record.file
        return files.plain_size(path) == record.bytes and files.sha256_file(path) == record.sha256

    def put(self, origin: _Source, record: FileRecord) -> None:
        files.publish(self.cache / record.file, lambda path: origin.verified(record, path))

    def finish(self, manifest: Manifest) -> Manifest:
        files.publish_bytes(self.cache / MANIFEST, manifest.to_json())
        shutil.rmtree(self.cache / PROGRESS, ignore_errors=True)
        return manifest


class _ToBucket(_Destination):
    """An object store: a record in `progress/` follows each shard, with the hashes of its tensors."""

    def __init__(self, objects: Objects):
        self.objects = objects
        self._hashes: list[dict[str, str]] = []
        self._found: Manifest | None = None
        """Manifest of a complete copy that lacks files."""

    def start(self, manifest: Manifest) -> Manifest | None:
        self._manifest, address = manifest, self.objects.address
        try:
            found = parse_manifest(self.objects.read(MANIFEST), self.objects.url(MANIFEST))
        except MissingObjectError:
            if next(self.objects.list(), None) is not None:
                raise CacheError(
                    f"{address} is not empty and holds no {MANIFEST}: choose a new or empty address"
                ) from None
            empty = {"shards": ShardFiles(), "files": (), "tensors": {}, "skipped": Skipped()}
            started = dataclasses.replace(manifest, status="incomplete", **empty)
            self.objects.write(MANIFEST, started.to_json())
        else:
            if found.status == "complete":
                self._found = _complete(address, found, manifest)
            else:
                refuse_another(address, found.identity, manifest.identity, "destination")
        self._sizes = {entry.name: entry.bytes for entry in self.objects.list()}
        if self._found and all(self._sizes.get(each.file) == each.bytes for each in self._found.all_files()):
            return self._found
        return None

    def has(self, record: FileRecord) -> bool:
        if self._found:
            return self._sizes.get(record.file) == record.bytes
        name = _record_name(record)
        if name not in self._sizes or self._sizes.get(record.file) != record.bytes:
            return False
        specs = shard_specs(self._manifest.identity, self._manifest.plan[len(self._hashes)])
        try:
            found = json.loads(self.objects.read(name))
            hashes = dict(found["tensors"])
            if found["sha256"] != record.sha256 or hashes.keys() != specs.keys():
                return False
        except (MissingObjectError, ValueError, KeyError, TypeError):
            return False
        self._hashes.append(hashes)
        return True

    def put(self, origin: _Source, record: FileRecord) -> None:
        with _local(origin, record) as path:
            self.objects.write(record.file, path)
            if self._found or not record.file.startswith("shards/"):
                return
            specs = shard_specs(self._manifest.identity, self._manifest.plan[len(self._hashes)])
            hashes = tensor_hashes(map_shard(path, specs).tensors)
        self._hashes.append(hashes)
        content = json.dumps({"sha256": record.sha256, "tensors": hashes}).encode()
        self.objects.write(_record_name(record), content)

    def finish(self, manifest: Manifest) -> Manifest:
        if self._found:
            return self._found
        columns = {name: tuple(each[name] for each in self._hashes) for name in self._hashes[0]}
        whole = dataclasses.replace(manifest, tensors=columns)
        self.objects.write(MANIFEST, whole.to_json())
        self.objects.remove([entry.name for entry in self.objects.list(PROGRESS)])
        return whole


@contextmanager
def _local(origin: _Source, record: FileRecord) -> Iterator[Path]:
    """Give a verified file of a source on this machine: its own, or a temporary copy."""
    if isinstance(origin, _Directory):
        path = origin.cache / record.file
        if files.plain_size(path) != record.bytes or files.sha256_file(path) != record.sha256:
            raise CacheError(f"{path} is damaged (its hash is another): {origin.remedy}")
        yield path
        return
    folder = default_store().folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files.remove_partials(folder)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=files.partial_name("sync")) as file:
            origin.verified(record, Path(file.name))
            yield Path(file.name)
    except OSError as error:
        raise files.write_error(folder, error) from error


def _complete(place: Place, found: Manifest, manifest: Manifest) -> Manifest:
    """Return the manifest of a complete copy. Raises CacheError if it is of another cache."""
    refuse_another(place, found.identity, manifest.identity, "destination")
    if found.status != "complete" or found.shards != manifest.shards:
        raise CacheError(f"{place} holds another capture of the same data: choose another destination")
    return found


def _digest(manifest: Manifest) -> str:
    return hashlib.sha256(manifest.to_json()).hexdigest()


def _record_name(record: FileRecord) -> str:
    return f"{PROGRESS}/{Path(record.file).stem}.json"
