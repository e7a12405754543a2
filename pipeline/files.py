"""Durable files: written under a temporary name, flushed, then renamed, so nobody sees half of one."""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Callable
from pathlib import Path


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


def remove_partials(folder: Path) -> None:
    """Remove the temporary files that killed processes of this machine left in `folder`."""
    for path in folder.glob(".*.partial"):
        owner = path.name.removesuffix(".partial").rpartition("~")
        if owner[0].endswith(f"~{_host()}") and owner[2].isdigit() and not _alive(int(owner[2])):
            path.unlink(missing_ok=True)


def _host() -> str:
    return socket.gethostname().replace("~", "-").replace("/", "-")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's process is a process
        return True
    return True


def publish(path: Path, write: Callable[[Path], object]) -> tuple[int, str]:
    """Let `write` fill a temporary file, flush it, hash it and rename it to `path`.

    Returns the file's size in bytes and its SHA-256. On any error the temporary file is removed and
    `path` is as it was.
    """
    partial = path.with_name(f".{path.name}~{_host()}~{os.getpid()}.partial")
    try:
        write(partial)
        descriptor = os.open(partial, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        size, digest = partial.stat().st_size, sha256_file(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync_directory(path.parent)
    return size, digest


def publish_bytes(path: Path, data: bytes) -> tuple[int, str]:
    """`publish` for bytes that are already in memory."""
    return publish(path, lambda partial: partial.write_bytes(data))
