"""Shards in an object store: the tensors asked for, as files of the local store."""

from __future__ import annotations

import hashlib
import mmap
import os
import struct
from collections.abc import Iterable
from pathlib import Path

from pipeline.cache.codecs import TensorSpec
from pipeline.cache.layout import shard_specs
from pipeline.cache.manifest import Manifest, shard_file
from pipeline.cache.remote.local import LocalStore, default_store
from pipeline.cache.remote.mirror import REMEDY, mirrored
from pipeline.cache.shard import MAX_HEADER_BYTES, MappedShard, file_layout, map_shard, read_header
from pipeline.cache.shards import Shards
from pipeline.errors import CacheError
from pipeline.remote.address import Address
from pipeline.remote.objects import MissingObjectError, Objects

# Bytes of a shard that the first request gets: most headers are shorter.
_HEAD_BYTES = 32 * 2**10


class RemoteShards(Shards):
    """The shards of a cache in an object store.

    Args:
        objects: the cache.
        store: the local store that fetched files are kept in.
        key: name of the cache in the store.
    """

    # What is mapped takes space on the disk, even when the store has evicted it.
    most_mapped = 64

    def __init__(self, objects: Objects, manifest: Manifest, store: LocalStore, key: str):
        super().__init__(manifest)
        self.objects, self.store, self._key = objects, store, key
        self._states: frozenset[str] | None = None

    def name(self, shard: int) -> str:
        return self.objects.url(shard_file(shard))

    def only(self, states: Iterable[str]) -> None:
        with self._lock:
            self._states = frozenset(states)
            self._mapped.clear()

    def check(self) -> None:
        sizes = {entry.name: entry.bytes for entry in self.objects.list("shards")}
        for shard, size in enumerate(self.manifest.shards.bytes):
            found = sizes.get(shard_file(shard))
            if found != size:
                got = "it is missing" if found is None else f"it has {found}"
                raise CacheError(f"{self.name(shard)} is damaged: expected {size} bytes, {got}; {REMEDY}")

    def mapped(self, shard: int) -> MappedShard | None:
        found = super().mapped(shard)
        return None if found is None or _evicted(found) else found

    def _open(self, shard: int) -> MappedShard:
        """Map a shard's tensors, fetched first if the local store lacks them.

        Raises:
            CacheError: its bytes are not those of the manifest, twice.
            StoreError: it can't be read.
        """
        specs = self._specs(shard)
        for _ in range(3):
            path = self.fetch(shard)
            try:
                return map_shard(path, specs, random=True)
            except CacheError:
                if path.exists():
                    raise
                # Evicted before it was opened.
        raise CacheError(
            f"the local store in {self.store.folder} loses shards before they are read: raise "
            "train.local_cache_bytes"
        )

    def _tidy(self) -> None:
        for shard in [number for number, mapped in self._mapped.items() if _evicted(mapped)]:
            del self._mapped[shard]
        super()._tidy()

    def _specs(self, shard: int) -> dict[str, TensorSpec]:
        """Return the tensors that a shard's local file has."""
        specs, states = shard_specs(self.manifest.identity, self.manifest.plan[shard]), self._states
        if states is None or not self.manifest.tensors:
            return specs
        always = ("input_ids", "loss_mask")
        return {n: spec for n, spec in specs.items() if n in always or n in states or _state(n) in states}

    def fetch(self, shard: int) -> Path:
        """Return a shard's local file, fetched if need be. See `map`."""
        specs = self._specs(shard)
        whole = not self.manifest.tensors
        layout = file_layout(specs)
        size = self.manifest.shards.bytes[shard] if whole else layout.size
        choice = hashlib.sha256("\n".join(sorted(specs)).encode()).hexdigest()[:12]
        name = f"{self._key}/shards/{choice}/{shard:05d}.safetensors"

        def fill(path: Path) -> None:
            for attempt in range(2):
                wrong = self._fetch_whole(shard, path) if whole else self._fetch_some(shard, specs, path)
                if wrong is None:
                    return
                if attempt:
                    raise CacheError(f"{self.name(shard)} is damaged ({wrong}, twice): {REMEDY}")

        return self.store.shard(name, size, fill)

    def _fetch_whole(self, shard: int, path: Path) -> str | None:
        """Fetch a whole shard; return what is wrong with it."""
        size = self.manifest.shards.bytes[shard]
        with path.open("r+b") as file:
            self._read(shard, [(0, size)], lambda offset, data: os.pwrite(file.fileno(), data, offset))
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return None if digest == self.manifest.shards.sha256[shard] else "its hash is another"

    def _fetch_some(self, shard: int, specs: dict[str, TensorSpec], path: Path) -> str | None:
        """Fetch tensors of a shard into a file of their own; return what is wrong with one."""
        places = self._places(shard)
        layout = file_layout(specs)
        spans = []  # first byte there, end there, first byte here
        for name, here in layout.offsets.items():
            begin, stop = places[name]
            spans.append((begin, stop, here))

        def write(offset: int, data: memoryview) -> None:
            begin, _, here = next(span for span in spans if span[0] <= offset < span[1])
            os.pwrite(descriptor, data, here + offset - begin)

        with path.open("r+b") as file:
            descriptor = file.fileno()
            os.pwrite(descriptor, layout.header, 0)
            self._read(shard, [span[:2] for span in spans], write)
            with mmap.mmap(descriptor, layout.size, access=mmap.ACCESS_READ) as data:
                for name, here in layout.offsets.items():
                    begin, stop = places[name]
                    with memoryview(data)[here : here + stop - begin] as view:
                        digest = hashlib.sha256(view).hexdigest()
                    if digest != self.manifest.tensors[name][shard]:
                        return f"tensor {name} has another hash"
        return None

    def _places(self, shard: int) -> dict[str, tuple[int, int]]:
        """Return first byte and end of every tensor of a shard in the store."""
        size = self.manifest.shards.bytes[shard]
        head = bytearray(min(size, _HEAD_BYTES))

        def keep(offset: int, data: memoryview) -> None:
            head[offset : offset + len(data)] = data

        self._read(shard, [(0, len(head))], keep)
        length = 8 + struct.unpack("<Q", head[:8])[0] if size >= 8 else 0
        if len(head) < length <= min(size, 8 + MAX_HEADER_BYTES):
            begin, head = len(head), head.ljust(length)
            self._read(shard, [(begin, length)], keep)
        specs = shard_specs(self.manifest.identity, self.manifest.plan[shard])
        return read_header(self.name(shard), bytes(head), size, specs)

    def _read(self, shard: int, ranges: list[tuple[int, int]], write) -> None:
        try:
            self.objects.read_ranges(shard_file(shard), ranges, write)
        except MissingObjectError:
            raise CacheError(f"{self.name(shard)} is missing: {REMEDY}") from None


def open_remote(address: Address, store: LocalStore | None) -> tuple[Path, RemoteShards]:
    """Return the folder of a remote cache's small files, and its shards. See `mirrored`."""
    objects, store = Objects(address), store or default_store()
    manifest, key, folder = mirrored(objects, store)
    return folder, RemoteShards(objects, manifest, store, key)


def _evicted(mapped: MappedShard) -> bool:
    return not os.fstat(mapped.descriptor).st_nlink


def _state(tensor: str) -> str:
    """Return the state that a tensor belongs to: `context.9` of `context.9.scale`."""
    kind, _, rest = tensor.partition(".")
    return f"{kind}.{rest.partition('.')[0]}" if kind == "context" else kind
