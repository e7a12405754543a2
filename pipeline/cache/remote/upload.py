"""Copy a complete cache from a directory to an object store."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from pipeline.cache.layout import shard_specs
from pipeline.cache.manifest import (
    MANIFEST,
    PROGRESS,
    Manifest,
    ShardFiles,
    parse_manifest,
    read_manifest,
    shard_file,
)
from pipeline.cache.same import refuse_another
from pipeline.cache.shard import map_shard
from pipeline.errors import CacheError
from pipeline.files import sha256_file
from pipeline.remote.objects import MissingObjectError, Objects


def upload(cache: Path, objects: Objects, progress: Callable[[int], object] = lambda done_bytes: None) -> int:
    """Copy a complete cache to an address, shard by shard and the manifest last.

    Every file is compared with its hash before it leaves. A record in `progress/` follows each shard, so that
    a stopped copy continues. The copy's manifest has the hashes of all tensors in addition.

    Args:
        progress: called with the bytes copied since the last call.

    Returns:
        The number of bytes copied, 0 if the whole cache is there.

    Raises:
        CacheError: the cache is incomplete or damaged, or the address holds another cache or other objects.
        StoreError: the address can't be read or written.
    """
    manifest = read_manifest(cache)
    if manifest.status != "complete":
        raise CacheError(f"{cache} is incomplete: run the same capture again to finish it")
    if _begin(objects, manifest):
        return 0
    records = {entry.name for entry in objects.list(PROGRESS)}
    columns: dict[str, list[str]] = {}
    copied = 0
    for shard, (size, digest) in enumerate(zip(manifest.shards.bytes, manifest.shards.sha256, strict=True)):
        name = f"{PROGRESS}/{shard:05d}.json"
        hashes = _recorded(objects, name, digest) if name in records else None
        if hashes is None:
            path = cache / shard_file(shard)
            hashes = tensor_hashes(path, manifest, shard)
            _check(path, size, digest)
            objects.write(shard_file(shard), path)
            objects.write(name, json.dumps({"sha256": digest, "tensors": hashes}).encode())
            copied += size
        progress(size)
        for tensor, each in hashes.items():
            columns.setdefault(tensor, []).append(each)
    for record in manifest.files:
        _check(cache / record.file, record.bytes, record.sha256)
        objects.write(record.file, cache / record.file)
        copied += record.bytes
        progress(record.bytes)
    whole = dataclasses.replace(manifest, tensors={name: tuple(each) for name, each in columns.items()})
    objects.write(MANIFEST, whole.to_json())
    objects.remove([entry.name for entry in objects.list(PROGRESS)])
    return copied


def _begin(objects: Objects, manifest: Manifest) -> bool:
    """Claim an address for a copy; return whether the whole cache is there already."""
    address = objects.address
    try:
        found = parse_manifest(objects.read(MANIFEST), objects.url(MANIFEST))
    except MissingObjectError:
        if next(objects.list(), None) is not None:
            raise CacheError(
                f"{address} is not empty and holds no {MANIFEST}: choose a new or empty address"
            ) from None
        started = dataclasses.replace(
            manifest, status="incomplete", shards=ShardFiles(), files=(), tensors={}
        )
        objects.write(MANIFEST, started.to_json())
        return False
    refuse_another(address, found.identity, manifest.identity, "destination")
    if found.status == "complete" and found.shards != manifest.shards:
        raise CacheError(f"{address} holds another capture of the same data: choose another destination")
    return found.status == "complete"


def _recorded(objects: Objects, name: str, digest: str) -> dict[str, str] | None:
    """Return the hashes of a copied shard's tensors; None if its record is of other bytes."""
    try:
        record = json.loads(objects.read(name))
        return record["tensors"] if record["sha256"] == digest else None
    except (MissingObjectError, ValueError, KeyError, TypeError):
        return None


def _check(path: Path, size: int, digest: str) -> None:
    try:
        same = path.stat().st_size == size and sha256_file(path) == digest
    except OSError:
        same = False
    if not same:
        raise CacheError(f"{path} is damaged: `dspark verify --repair` sets it aside, then capture again")


def tensor_hashes(path: Path, manifest: Manifest, shard: int) -> dict[str, str]:
    """Return the SHA-256 of every tensor of a shard's file, by name. Raises CacheError if it is damaged."""
    mapped = map_shard(path, shard_specs(manifest.identity, manifest.plan[shard]))
    return {name: _hash(tensor) for name, tensor in mapped.tensors.items()}


def _hash(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.flatten().view(torch.uint8).numpy()).hexdigest()
