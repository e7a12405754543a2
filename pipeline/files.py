"""Files and directories that appear whole or not at all: written under a temporary name, flushed, renamed."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import stat
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path

from pipeline import process
from pipeline.errors import UsageError, WriteError
from pipeline.text import reason

# Bytes hashed and written at a time: few enough to stay in a processor's cache between the two.
BLOCK_BYTES = 4 * 2**20
_PARTIAL = ".partial"


def sync(path: Path) -> None:
    """Flush a file, or a directory's entries, so that it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path) -> str:
    """Return the hex SHA-256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def plain_size(path: Path) -> int:
    """Return the size of a plain file; -1 for anything else, such as nothing, a link, a folder or a pipe."""
    try:
        found = path.lstat()
    except (OSError, ValueError):
        return -1
    return found.st_size if stat.S_ISREG(found.st_mode) else -1


def read_small(path: Path, limit: int) -> bytes:
    """Return a plain file's bytes. Follows no link and waits for no pipe: the file may be anybody's.

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
    """Return a file's temporary name, which names the process that writes it (by default this one)."""
    return f".{name}~{place or process.place()}~{pid or os.getpid()}{_PARTIAL}"


def remove_partials(folder: Path) -> None:
    """Remove the temporary files that dead processes of this machine left in `folder`."""
    for path in folder.glob(f".*{_PARTIAL}"):
        place, _, pid = path.name.removesuffix(_PARTIAL).rpartition("~")
        if place.endswith(f"~{process.place()}") and pid.isdecimal() and not process.alive(int(pid)):
            with suppress(OSError):  # another user's, in a shared folder
                path.unlink()


def write_error(path: Path | str, error: BaseException, kept: str = "") -> WriteError:
    """Return the error for a file or directory that can't be written, with the system's reason and a remedy.

    Args:
        kept: what is not lost, for the end of the message.
    """
    remedy = "fix that, then run the same command again"
    return WriteError(f"{path} can't be written ({reason(error)}): {remedy}{kept and '; '}{kept}")


@contextmanager
def _appearing(path: Path, partial: Path, remove: Callable[[Path], object], kept: str = "") -> Iterator[None]:
    """Remove `partial` before and after the block; turn failures to write into a WriteError about `path`."""
    try:
        remove(partial)
        yield
    except OSError as error:
        raise write_error(path, error, kept) from error
    except Exception as error:
        from safetensors import SafetensorError  # its own type for a failure to write

        if not isinstance(error, SafetensorError):
            raise
        raise write_error(path, error, kept) from error
    finally:
        with suppress(OSError):
            remove(partial)


_remove_file = functools.partial(Path.unlink, missing_ok=True)
_remove_folder = functools.partial(shutil.rmtree, ignore_errors=True)


@contextmanager
def _publishing(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Hand out a temporary path, and rename the file there to `path` if the block succeeds."""
    partial = path.with_name(partial_name(f"{path.name}~{threading.get_native_id()}"))
    # What has that name is removed and never written through: it could be a link to somewhere else.
    with _appearing(path, partial, _remove_file, "what was finished before is kept"):
        yield partial
        if replace or not _linked(partial, path):
            partial.replace(path)
        sync(path.parent)


def _linked(partial: Path, path: Path) -> bool:
    """Give a file the name `path` unless something has it. False if the file system has no links."""
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
        sync(partial)
        size, digest = partial.stat().st_size, sha256_file(partial)
    return size, digest


def publish_bytes(
    path: Path,
    *pieces: bytes | memoryview,
    replace: bool = True,
    step: Callable[[str], AbstractContextManager] = nullcontext,
) -> tuple[int, str]:
    """Publish a file from pieces in memory, one after the other, hashed as they are written. See `publish`.

    Args:
        replace: False keeps an existing file as it is.
        step: entered around every "hash" and "write", to measure them.
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


def check_new(folder: Path) -> None:
    """Check that `folder` does not exist yet, or is an empty directory.

    Raises:
        UsageError: it is a file, or a directory that holds something.
        WriteError: it can't be read.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"expected a directory to write, {folder} is a file: choose another name")
        if folder.exists() and any(path.name != _PARTIAL for path in folder.iterdir()):
            raise UsageError(f"{folder} is not empty: choose another directory, or remove this one first")
    except OSError as error:
        raise write_error(folder, error) from None


@contextmanager
def new_folder(folder: Path, *, last: str) -> Iterator[Path]:
    """Hand out a temporary directory, and give it the name `folder` if the block succeeds.

    An existing empty `folder` stays, with its mode, because a process may be in it: the files are moved into
    it. Files get the mode that the user's umask asks for and are flushed first. On any error the temporary
    directory is removed, and so is what was moved.

    Args:
        last: the file to be moved last: without it the directory is not whole.

    Raises:
        UsageError: `folder` exists and is not an empty directory.
        WriteError: the disk is full, permission is missing, or the file system failed.
    """
    check_new(folder)
    try:
        folder = folder.resolve()
    except (OSError, RuntimeError) as error:  # a link that leads to itself
        raise write_error(folder, error) from None
    exists = folder.is_dir()
    partial = folder / _PARTIAL if exists else folder.with_name(f".{folder.name}{_PARTIAL}")
    with _appearing(folder, partial, _remove_folder):
        partial.mkdir(parents=True)
        yield partial
        _flush(partial)
        if exists:
            _move(partial, folder, last)
            sync(folder)
        else:
            partial.rename(folder)
            sync(folder.parent)


def _move(partial: Path, folder: Path, last: str) -> None:
    """Move everything into a directory, or nothing."""
    moved: list[Path] = []
    try:
        for path in sorted(partial.iterdir(), key=lambda path: path.name == last):
            moved.append(path.rename(folder / path.name))
    except BaseException:
        for path in reversed(moved):
            path.rename(partial / path.name)
        raise


def _flush(folder: Path) -> None:
    """Give every file in a directory the mode that the umask asks for, and flush everything in it."""
    mode = folder.stat().st_mode & 0o666  # safetensors makes files that only their owner can read
    for path in folder.rglob("*"):
        if path.is_symlink():
            continue
        if not path.is_dir():
            path.chmod(mode)
        sync(path)
    sync(folder)
