"""The local store: a folder with a byte limit, where what was fetched from object stores is kept.

Every process of a machine may use it at once, and any of them may be killed at any moment. A file appears
whole or not at all. Locks are the kernel's (`flock`), which a dead process does not keep.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline import files
from pipeline.errors import ConfigError
from pipeline.remote.address import Address
from pipeline.text import size

VARIABLE = "DSPARK_LOCAL_CACHE"
# Files whose locks are apart, so that processes rarely wait for each other's fetches.
_LOCKS = 64
_WAIT_S = 0.05
# Share of the limit that is freed at once.
_SPARE = 0.05
# A file that is being fetched is written all the time. One that was not for so long has no process any more.
_DEAD_S = 900.0


@dataclass(frozen=True)
class LocalStore:
    """A folder of fetched shards, shared by the processes of a machine."""

    folder: Path
    limit: int
    """Most bytes of fetched shards, those being fetched included."""

    def file(self, name: str, bytes_needed: int, fetch: Callable[[Path], object]) -> Path:
        """Return a fetched file, from the store or by `fetch`; its time of last use becomes now.

        Args:
            name: relative to the folder.
            bytes_needed: size of the file.
            fetch: writes the file to the path given, an empty file by then.

        Raises:
            ConfigError: the file is larger than the store.
            WriteError: the folder can't be written to.
        """
        path = self.folder / name
        if self._use(path):
            return path
        with self._locked(name):
            if self._use(path):  # another process has fetched it meanwhile
                return path
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                partial = path.with_name(files.partial_name(path.name))
                self._reserve(partial, bytes_needed)
                try:
                    fetch(partial)
                    files.sync(partial)
                    with self._locked(""):  # a file renamed while another process counts could be missed
                        partial.replace(path)
                finally:
                    partial.unlink(missing_ok=True)
            except OSError as error:
                raise files.write_error(path, error) from error
        return path

    def _use(self, path: Path) -> bool:
        try:
            os.utime(path)
        except FileNotFoundError:
            return False
        return True

    def _reserve(self, partial: Path, bytes_needed: int) -> None:
        """Evict what was used longest ago until a file fits, and make the file with its full size."""
        if bytes_needed > self.limit:
            raise ConfigError(
                f"a shard of {size(bytes_needed)} does not fit the local store of {size(self.limit)} in "
                f"{self.folder}: raise train.local_cache_bytes"
            )
        while True:
            with self._locked(""):
                if self._counted() + bytes_needed <= self.limit or self._evict(bytes_needed):
                    self._count(self._counted() + bytes_needed)
                    with partial.open("wb") as file:
                        file.truncate(bytes_needed)
                    return
            time.sleep(_WAIT_S)  # other processes fetch all that fits

    def _evict(self, bytes_needed: int) -> bool:
        """Look at every file, and remove those used longest ago; return whether there is room then.

        A little more than is needed goes, so that not every fetch has to look.
        """
        files.remove_partials(self.folder / "locks")
        found = sorted(self._files(), key=lambda entry: entry[1])
        used = sum(count for _, _, count in found)
        aim = self.limit - max(bytes_needed, int(self.limit * _SPARE))
        for path, _, count in found:
            if used <= aim:
                break
            if not path.name.startswith("."):  # being fetched
                path.unlink(missing_ok=True)
                used -= count
        self._count(used)
        return used + bytes_needed <= self.limit

    def _counted(self) -> int:
        """Return no less than the bytes in the store, under its lock: killed processes leave too much."""
        try:
            return int((self.folder / "locks" / "bytes").read_text())
        except (FileNotFoundError, ValueError):
            return self.limit + 1  # nobody has counted yet

    def _count(self, used: int) -> None:
        path = self.folder / "locks" / "bytes"
        partial = path.with_name(files.partial_name(path.name))
        partial.write_text(str(used))
        partial.replace(path)

    def _files(self) -> Iterator[tuple[Path, float, int]]:
        """Yield the shards with their times of last use and sizes, and those being fetched."""
        for folder in self.folder.glob("*/fetched/*"):
            files.remove_partials(folder)
            for entry in os.scandir(folder):
                with contextlib.suppress(FileNotFoundError):
                    found = entry.stat()
                    if entry.name.startswith(".") and time.time() - found.st_mtime > _DEAD_S:
                        Path(entry.path).unlink()
                        continue
                    yield Path(entry.path), found.st_mtime, found.st_size

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Hold the lock of a file's name, or with no name the one of the whole store."""
        number = int(hashlib.sha256(name.encode()).hexdigest(), 16) % _LOCKS if name else "all"
        path = self.folder / "locks" / str(number)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise files.write_error(path, error) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def temporary(self) -> Iterator[Path]:
        """Make a folder beside the shards, removed at the end; remove those of processes that were killed.

        Raises:
            WriteError: it can't be made.
        """
        parent = self.folder / "temporary"
        try:
            parent.mkdir(parents=True, exist_ok=True)
            with self._locked("temporary"):
                for path in parent.iterdir():
                    with contextlib.suppress(OSError), (path / "lock").open("w") as lock:
                        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        shutil.rmtree(path, ignore_errors=True)
                folder = Path(tempfile.mkdtemp(dir=parent))
                lock = (folder / "lock").open("w")
                fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            raise files.write_error(parent, error) from error
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            lock.close()

    @contextlib.contextmanager
    def folder_lock(self, name: str) -> Iterator[Path]:
        """Hold the lock of a folder in the store and return its path."""
        with self._locked(name):
            yield self.folder / name


def staging_folder(address: Address) -> Path:
    """Return the directory of this machine through which a capture writes to an object store."""
    name = hashlib.sha256(address.url.encode()).hexdigest()[:24]
    return default_folder() / "staging" / name


def default_folder() -> Path:
    """Return the folder of the local store: of DSPARK_LOCAL_CACHE, else among the user's caches."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get(VARIABLE) or base / "dspark-pipeline")


def default_store(folder: Path | None = None, limit: int | None = None) -> LocalStore:
    """Return the store of this machine.

    Args:
        folder: see `default_folder`.
        limit: by default half of what is free or already used by it.
    """
    folder = default_folder() if folder is None else folder
    store = LocalStore(folder, limit or 0)
    if limit is None:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        used = sum(count for _, _, count in store._files())
        store = LocalStore(folder, (shutil.disk_usage(existing).free + used) // 2)
    return store
