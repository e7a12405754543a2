"""The shards of a complete cache, mapped when they are first read."""

from __future__ import annotations

import mmap
import os
import stat
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Hashable, Iterable
from pathlib import Path
from threading import Lock

from pipeline.cache.layout import shard_specs
from pipeline.cache.manifest import FROZEN, MANIFEST, Manifest, is_weights, shard_file
from pipeline.cache.shard import MappedShard, map_shard, open_direct
from pipeline.errors import CacheError


class Shards(ABC):
    """Shards of one cache, the last ones mapped. Safe to use from several threads."""

    # Shards mapped at once. A mapping takes address space and up to three file handles, of usually 1,024.
    most_mapped = 256
    remote = False
    """True for `RemoteShards`, whose shards are fetched, ahead of use too."""

    def __init__(self, manifest: Manifest):
        self.manifest = manifest
        self._direct = False
        self._mapped: OrderedDict[Hashable, MappedShard] = OrderedDict()
        self._lock = Lock()

    @abstractmethod
    def name(self, shard: int) -> str:
        """Return a shard's path or URL, for messages."""

    @abstractmethod
    def check(self) -> None:
        """Check that every shard exists and has its size. Raise CacheError that names the first one not."""

    def only(self, states: Iterable[str] | None) -> Iterable[str] | None:
        """Take note that no other states will be read, beside token ids and masks; None is all of them.

        Returns:
            The states of before.
        """
        return None

    def map(self, shard: Hashable) -> MappedShard:
        """Return a shard, mapped now if it was not. Raises CacheError if it is missing or damaged."""
        found = self.mapped(shard)
        if found is None:
            found = self._open(shard)
            with self._lock:
                self._mapped[shard] = found
                self._tidy()
        return found

    def mapped(self, shard: Hashable) -> MappedShard | None:
        """Return a shard if it is mapped."""
        with self._lock:
            found = self._mapped.get(shard)
            if found is not None:
                self._mapped.move_to_end(shard)
            return found

    def can_read_directly(self) -> bool:
        """Return whether the disk of the files that are mapped offers reads past the page cache."""
        found = open_direct(self._any_file())
        if found is None:
            return False
        try:
            return os.preadv(found, [mmap.mmap(-1, mmap.PAGESIZE)], 0) > 0
        except OSError:
            return False
        finally:
            os.close(found)

    def read_directly(self) -> None:
        """Map shards from now on so that they can be read past the page cache too."""
        with self._lock:
            self._direct = True
            self._mapped.clear()

    @abstractmethod
    def _any_file(self) -> Path:
        """Return a file on the disk that mapped files are on."""

    @abstractmethod
    def _open(self, shard: Hashable) -> MappedShard:
        """Map a shard. See `map`."""

    def _tidy(self) -> None:
        """Unmap the shards that were not used for longest, under the lock."""
        while len(self._mapped) > self.most_mapped:
            self._mapped.popitem(last=False)


class LocalShards(Shards):
    """The shards of a cache in a directory."""

    def __init__(self, cache: Path, manifest: Manifest):
        super().__init__(manifest)
        self._cache = cache

    def name(self, shard: int) -> str:
        return str(self._cache / shard_file(shard))

    def _any_file(self) -> Path:
        return self._cache / shard_file(0)

    def check(self) -> None:
        for shard, size in enumerate(self.manifest.shards.bytes):
            check_size(self._cache / shard_file(shard), size)

    def _open(self, shard: int) -> MappedShard:
        path = self._cache / shard_file(shard)
        check_size(path, self.manifest.shards.bytes[shard])
        specs = shard_specs(self.manifest.identity, self.manifest.plan[shard])
        return map_shard(path, specs, random=True, direct=self._direct)


def check_files(cache: Path, manifest: Manifest) -> None:
    """Check folders, the sizes of files beside the shards, and that `target/` has no other weights.

    Raises:
        CacheError: names what is wrong.
    """
    for folder in ("target", "shards"):
        if (cache / folder).is_symlink() or not (cache / folder).is_dir():
            raise CacheError(f"{cache / folder} is not a directory: capture again")
    for path in (cache / "target").iterdir():
        name = f"target/{path.name}"
        if name != FROZEN and is_weights(path.name) and path.is_file() and not path.is_symlink():
            raise CacheError(
                f"{path} looks like weights of the target, which a cache must not hold: remove it"
            )
    if (
        manifest.tensors
        and manifest.tensors.keys() != shard_specs(manifest.identity, manifest.plan[0]).keys()
    ):
        raise CacheError(
            f"{cache / MANIFEST} is damaged (it has hashes of other tensors than its shards): capture again"
        )
    for record in manifest.files:
        check_size(cache / record.file, record.bytes)


def check_size(path: Path, size: int) -> None:
    """Check that a file of a cache is a plain one of this size. Raise CacheError if not."""
    try:
        found = path.lstat()
    except OSError:
        found = None
    if found is None or not stat.S_ISREG(found.st_mode):
        got = "it is missing or not a plain file"
    elif found.st_size != size:
        got = f"it has {found.st_size}"
    else:
        return
    raise CacheError(
        f"{path} is damaged: expected {size} bytes, {got}; "
        "`dspark verify --repair` sets damaged files aside, then capture again"
    )
