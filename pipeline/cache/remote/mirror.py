"""The small files of a cache in an object store, in a folder of the local store."""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path

from pipeline import files
from pipeline.cache.manifest import MANIFEST, FileRecord, Manifest, parse_manifest
from pipeline.cache.remote.local import LocalStore
from pipeline.errors import CacheError
from pipeline.remote.objects import MissingObjectError, Objects

REMEDY = "copy the cache there again with `dspark sync`"


def mirrored(objects: Objects, store: LocalStore) -> tuple[Manifest, str, Path]:
    """Return a complete cache's manifest, its name in the local store, and the folder of its small files.

    The manifest is read from the object store each time; what it names is fetched once and checked by its
    hash. A cache with another manifest has another folder.

    Raises:
        CacheError: there is no complete cache, or a file is not that of the manifest, twice.
        StoreError: it can't be read.
        WriteError: the local store can't be written to.
    """
    manifest, data = read_remote_manifest(objects)
    key = hashlib.sha256(data).hexdigest()[:24]
    with store.folder_lock(key) as folder:
        whole = all(files.plain_size(folder / record.file) == record.bytes for record in manifest.files)
        if not (whole and (folder / MANIFEST).exists()):
            try:
                _fetch(objects, manifest, folder)
                (folder / "shards").mkdir(exist_ok=True)
            except OSError as error:
                raise files.write_error(folder, error) from error
            files.publish_bytes(folder / MANIFEST, data)
    return manifest, key, folder


def read_remote_manifest(objects: Objects) -> tuple[Manifest, bytes]:
    """Return the manifest of a complete cache in an object store, and its bytes.

    Raises:
        CacheError: there is no complete cache.
        StoreError: it can't be read.
    """
    try:
        data = objects.read(MANIFEST)
    except MissingObjectError:
        raise CacheError(f"no cache at {objects.address}: expected an object {MANIFEST} there") from None
    manifest = parse_manifest(data, objects.url(MANIFEST))
    if manifest.status != "complete":
        raise CacheError(f"{objects.address} is incomplete: run the command that writes it again")
    return manifest, data


def found_manifest(objects: Objects) -> Manifest | None:
    """Return the manifest in an object store, of a complete cache or not; None without one.

    Raises:
        CacheError: it is damaged.
        StoreError: it can't be read.
    """
    try:
        return parse_manifest(objects.read(MANIFEST), objects.url(MANIFEST))
    except MissingObjectError:
        return None


def fetch_file(objects: Objects, record: FileRecord, path: Path) -> None:
    """Fetch a file of a cache, of any size, to `path`. Raises CacheError if it is missing."""
    with path.open("wb") as file:
        file.truncate(record.bytes)

        def write(offset: int, data: memoryview) -> None:
            os.pwrite(file.fileno(), data, offset)

        try:
            objects.read_ranges(record.file, [(0, record.bytes)], write)
        except MissingObjectError:
            raise CacheError(f"{objects.url(record.file)} is missing: {REMEDY}") from None


def fetch_verified(objects: Objects, record: FileRecord, path: Path) -> None:
    """Fetch a file and compare its hash, twice if need be. Raises CacheError."""
    for _ in range(2):
        fetch_file(objects, record, path)
        if files.sha256_file(path) == record.sha256:
            return
    raise CacheError(f"{objects.url(record.file)} is damaged (its hash is another, twice): {REMEDY}")


def _fetch(objects: Objects, manifest: Manifest, folder: Path) -> None:
    for record in manifest.files:
        path = folder / record.file
        path.parent.mkdir(parents=True, exist_ok=True)
        files.publish(path, functools.partial(fetch_verified, objects, record))
