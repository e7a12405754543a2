"""Durable files: written under a temporary name, flushed, then renamed, so nobody sees half of one."""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

from pipeline import process
from pipeline.errors import WriteError

# What is hashed and written at a time: small enough to stay in a processor's cache between the two.
BLOCK_BYTES = 4 * 2**20


def sync_directory(path: Path) -> None:
    """Flush a directory's entries, so that a rename inside it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    """The hex SHA-256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plain_size(path: Path) -> int:
    """The size of a plain file; -1 for anything else: nothing there, a link, a folder, a pipe."""
    try:
        found = path.lstat()
    except (OSError, ValueError):
        return -1
    return found.st_size if stat.S_ISREG(found.st_mode) else -1


def read_small(path: Path, limit: int) -> bytes:
    """A plain file's bytes, where anybody may have put anything: follows no link and waits for no pipe.

    Raises:
        OSError: missing, not a plain file, or larger than `limit` bytes.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_size > limit:
            raise OSError(f"{path} is not a plain file of at most {limit} bytes")
        return file.read(limit)


def partial_name(name: str, place: str | None = None, pid: int | None = None) -> str:
    """The temporary name of a file: which process (by default this one) of which place writes it."""
    return f".{name}~{place or process.place()}~{pid or os.getpid()}.partial"


def remove_partials(folder: Path) -> None:
    """Remove the temporary files that killed processes of this machine left in `folder`."""
    for path in folder.glob(".*.partial"):
        place, _, pid = path.name.removesuffix(".partial").rpartition("~")
        if place.endswith(f"~{process.place()}") and pid.isdecimal() and not process.alive(int(pid)):
            path.unlink(missing_ok=True)


@contextmanager
def _publishing(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Hand out a temporary path, and rename the file there to `path` if the block succeeds."""
    partial = path.with_name(partial_name(f"{path.name}~{threading.get_native_id()}"))
    try:
        partial.unlink(missing_ok=True)  # never written through: it could be a link to somewhere else
        yield partial
        if replace or not _linked(partial, path):
            partial.replace(path)
        sync_directory(path.parent)
    except OSError as error:
        raise WriteError(
            f"{path} can't be written ({error.strerror or error}): mend that, then run the same command "
            "again; what was finished before is kept"
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _linked(partial: Path, path: Path) -> bool:
    """Give a file its name unless something has it; False where the file system knows no links."""
    try:
        os.link(partial, path)
    except FileExistsError:
        pass
    except OSError:
        return False
    return True


def publish(path: Path, write: Callable[[Path], object]) -> tuple[int, str]:
    """Let `write` fill a temporary file, flush it, hash it and rename it to `path`.

    Returns the file's size in bytes and its SHA-256. On any error the temporary file is removed and
    `path` is as it was.

    Raises:
        WriteError: the disk is full, permission is missing, or the file system failed.
    """
    with _publishing(path) as partial:
        write(partial)
        descriptor = os.open(partial, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        size, digest = partial.stat().st_size, sha256_file(partial)
    return size, digest


def publish_bytes(
    path: Path,
    *pieces: bytes | memoryview,
    replace: bool = True,
    step: Callable[[str], AbstractContextManager] = nullcontext,
) -> tuple[int, str]:
    """`publish` for what is in memory already, one piece after the other; hashed as it is written.

    Args:
        replace: False leaves a file that is there already as it is.
        step: entered around every "hash" and "write", for whoever measures.
    """
    digest, size = hashlib.sha256(), 0
    with _publishing(path, replace=replace) as partial, partial.open("xb", buffering=0) as file:
        for block in _blocks(pieces):
            with step("hash"):
                digest.update(block)
            size += len(block)
            with step("write"):
                while block:
                    block = block[file.write(block) :]
        with step("write"):
            os.fsync(file.fileno())
    return size, digest.hexdigest()


def _blocks(pieces: Iterable[bytes | memoryview]) -> Iterator[memoryview]:
    for piece in pieces:
        whole = memoryview(piece).cast("B")
        for start in range(0, len(whole), BLOCK_BYTES):
            yield whole[start : start + BLOCK_BYTES]
