"""Shards and samples in an object store: the tensors asked for, as files of the local store."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from pipeline.cache.codecs import TensorSpec
from pipeline.cache.index import sample_id
from pipeline.cache.layout import LAST_HIDDEN, shard_specs, state_of
from pipeline.cache.manifest import MANIFEST, Manifest, ShardPlan, shard_file
from pipeline.cache.remote.local import LocalStore, default_store
from pipeline.cache.remote.mirror import REMEDY, mirrored
from pipeline.cache.shard import (
    MAX_HEADER_BYTES,
    MappedShard,
    file_layout,
    map_shard,
    read_header,
    tensor_hashes,
)
from pipeline.cache.shards import Shards
from pipeline.errors import CacheError
from pipeline.remote.address import Address
from pipeline.remote.objects import MissingObjectError, Objects

# Bytes of a shard that the first request gets: most headers are shorter.
_HEAD_BYTES = 32 * 2**10
_TOKENS = ("input_ids", "loss_mask")


@dataclass(frozen=True)
class SampleRows:
    """One sample's place in its shard."""

    number: int
    """Row of the index."""
    id: bytes
    shard: int
    tokens: tuple[int, int]
    """First row and end among the shard's tokens."""
    context: tuple[tuple[int, int], ...]
    """The same among its rows of context, of each part of the sample's."""
    last_rows: tuple[int, int]
    """The same among its rows of last hidden states."""

    def rows(self, tensor: str) -> tuple[tuple[int, int], ...]:
        """Return first row and end of each part of the sample's rows in a tensor of the shard."""
        if tensor in _TOKENS:
            return (self.tokens,)
        return (self.last_rows,) if state_of(tensor) == LAST_HIDDEN else self.context


class RemoteShards(Shards):
    """The shards of a cache in an object store.

    A shard is fetched whole, or without the states that nobody reads where the manifest has hashes of
    tensors. What arrives is compared with its hash. Single samples have no hash: their token ids and masks
    are compared with the sample's id.

    Args:
        objects: the cache.
        store: the local store that fetched files are kept in.
        key: name of the cache in the store.
        folder: where the store has the cache's small files.
    """

    # What is mapped takes space on the disk, even when the store has evicted it.
    most_mapped = 64
    remote = True

    def __init__(self, objects: Objects, manifest: Manifest, store: LocalStore, key: str, folder: Path):
        super().__init__(manifest)
        self.objects, self.store, self._key, self._folder = objects, store, key, folder
        self._states: frozenset[str] | None = None
        self._places = lru_cache(maxsize=4096)(self._read_places)

    def name(self, shard: int) -> str:
        return self.objects.url(shard_file(shard))

    def only(self, states: Iterable[str] | None) -> Iterable[str] | None:
        with self._lock:
            before, self._states = self._states, None if states is None else frozenset(states)
            self._mapped.clear()
        return before

    def check(self) -> None:
        sizes = {entry.name: entry.bytes for entry in self.objects.list("shards")}
        for shard, size in enumerate(self.manifest.shards.bytes):
            found = sizes.get(shard_file(shard))
            if found != size:
                got = "it is missing" if found is None else f"it has {found}"
                raise CacheError(f"{self.name(shard)} is damaged: expected {size} bytes, {got}; {REMEDY}")

    def _any_file(self) -> Path:
        return self._folder / MANIFEST

    def mapped(self, key: int | SampleRows) -> MappedShard | None:
        found = super().mapped(key)
        if found is not None:
            os.utime(found.descriptor)  # used now, for all processes that may evict it
        return found

    def _open(self, key: int | SampleRows) -> MappedShard:
        for _ in range(10):
            path, specs = self._fetch(key)
            try:
                return map_shard(path, specs, random=True, direct=self._direct)
            except CacheError:  # evicted before it was opened, or damaged on the disk since it arrived
                path.unlink(missing_ok=True)
        raise CacheError(
            f"the local store in {self.store.folder} loses shards before they are read: raise "
            "train.local_cache_bytes"
        )

    def _tidy(self) -> None:
        for key in [key for key, mapped in self._mapped.items() if _evicted(mapped)]:
            del self._mapped[key]
        super()._tidy()

    def fetch(self, key: int | SampleRows) -> None:
        """Have a shard, or a sample alone, in the local store.

        Raises:
            CacheError: its bytes are not those of the manifest, twice.
            StoreError: it can't be read.
            ConfigError: the local store is too small.
        """
        self._fetch(key)

    @property
    def ahead_bytes(self) -> int:
        """Bytes that may be fetched before they are read."""
        return self.store.limit // 2

    def size(self, key: int | SampleRows) -> int:
        """Return the size of a shard's local file, or of a sample's."""
        if isinstance(key, int) and not self.manifest.tensors:
            return self.manifest.shards.bytes[key]
        return file_layout(self._specs(key)).size

    def _specs(self, key: int | SampleRows) -> dict[str, TensorSpec]:
        """Return the tensors that a local file has."""
        if isinstance(key, int):
            specs = shard_specs(self.manifest.identity, self.manifest.plan[key])
            if not self.manifest.tensors:  # its one hash is that of the whole file
                return specs
        else:
            tokens, rows = (stop - start for start, stop in (key.tokens, key.last_rows))
            specs = shard_specs(self.manifest.identity, ShardPlan(samples=1, tokens=tokens, last_rows=rows))
        wanted = self._states
        return {n: s for n, s in specs.items() if wanted is None or n in _TOKENS or state_of(n) in wanted}

    def _fetch(self, key: int | SampleRows) -> tuple[Path, dict[str, TensorSpec]]:
        specs = self._specs(key)
        choice = hashlib.sha256("\n".join(sorted(specs)).encode()).hexdigest()[:12]
        file = f"shard-{key:05d}" if isinstance(key, int) else f"sample-{key.number}"

        def fill(path: Path) -> None:
            for attempt in range(2):
                wrong = self._fill(key, specs, path)
                if wrong is None:
                    return
                if attempt:
                    shard = key if isinstance(key, int) else key.shard
                    raise CacheError(f"{self.name(shard)} is damaged ({wrong}, twice): {REMEDY}")

        path = self.store.file(f"{self._key}/fetched/{choice}/{file}.safetensors", self.size(key), fill)
        return path, specs

    def _fill(self, key: int | SampleRows, specs: dict[str, TensorSpec], path: Path) -> str | None:
        """Fetch into a file of the right size; return what is wrong with the bytes that came."""
        if isinstance(key, SampleRows):
            self._copy(key.shard, specs, path, key)
            return _wrong_sample(path, specs, key)
        if self.manifest.tensors:
            self._copy(key, specs, path)
            return self._wrong_tensor(path, specs, key)
        with path.open("r+b") as file:
            size = self.manifest.shards.bytes[key]
            self._read(key, [(0, size)], lambda offset, data: os.pwrite(file.fileno(), data, offset))
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return None if digest == self.manifest.shards.sha256[key] else "it has another hash"

    def _copy(
        self, shard: int, specs: dict[str, TensorSpec], path: Path, sample: SampleRows | None = None
    ) -> None:
        """Fetch tensors of a shard, or one sample's rows of them, into a file of their own."""
        places, layout = self._places(shard), file_layout(specs)
        spans = []  # first byte there, end there, first byte here
        for name, here in layout.offsets.items():
            begin, stop = places[name]
            dtype, (_, *shape) = specs[name]
            width = dtype.itemsize * torch.Size(shape).numel()
            for first, end in sample.rows(name) if sample else [(0, (stop - begin) // width)]:
                spans.append((begin + first * width, begin + end * width, here))
                here += (end - first) * width

        def write(offset: int, data: memoryview) -> None:
            begin, _, here = next(span for span in spans if span[0] <= offset < span[1])
            os.pwrite(descriptor, data, here + offset - begin)

        with path.open("r+b") as file:
            descriptor = file.fileno()
            os.pwrite(descriptor, layout.header, 0)
            self._read(shard, [span[:2] for span in spans], write)

    def _wrong_tensor(self, path: Path, specs: dict[str, TensorSpec], shard: int) -> str | None:
        for name, digest in tensor_hashes(map_shard(path, specs).tensors).items():
            if digest != self.manifest.tensors[name][shard]:
                return f"tensor {name} has another hash"
        return None

    def _read_places(self, shard: int) -> dict[str, tuple[int, int]]:
        """Return first byte and end of every tensor of a shard in the object store."""
        size = self.manifest.shards.bytes[shard]
        head = bytearray(min(size, _HEAD_BYTES))

        def keep(offset: int, data: memoryview) -> None:
            head[offset : offset + len(data)] = data

        self._read(shard, [(0, len(head))], keep)
        length = 8 + struct.unpack("<Q", head[:8])[0] if size >= 8 else 0
        if len(head) < length <= min(size, 8 + MAX_HEADER_BYTES):
            begin = len(head)
            head.extend(bytes(length - begin))
            self._read(shard, [(begin, length)], keep)
        specs = shard_specs(self.manifest.identity, self.manifest.plan[shard])
        return read_header(self.name(shard), bytes(head), size, specs)

    def _read(
        self, shard: int, ranges: list[tuple[int, int]], write: Callable[[int, memoryview], object]
    ) -> None:
        try:
            self.objects.read_ranges(shard_file(shard), ranges, write)
        except MissingObjectError:
            raise CacheError(f"{self.name(shard)} is missing: {REMEDY}") from None


def open_remote(address: Address, store: LocalStore | None) -> tuple[Path, RemoteShards]:
    """Return the folder of a remote cache's small files, and its shards. See `mirrored`."""
    objects, store = Objects(address), store or default_store()
    manifest, key, folder = mirrored(objects, store)
    return folder, RemoteShards(objects, manifest, store, key, folder)


def _evicted(mapped: MappedShard) -> bool:
    return not os.fstat(mapped.descriptor).st_nlink


def _wrong_sample(path: Path, specs: dict[str, TensorSpec], sample: SampleRows) -> str | None:
    tensors = map_shard(path, specs).tensors
    content = sample_id(*(tensors[name].numpy() for name in _TOKENS))
    return None if content == sample.id else f"sample {sample.number} has other tokens than its id says"
