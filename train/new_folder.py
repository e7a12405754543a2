"""A directory that appears whole, under its name, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from pipeline import files
from pipeline.errors import UsageError, WriteError

_PARTIAL = ".partial"


def check_new(folder: Path) -> None:
    """Whether a directory can begin here: there is nothing yet, or an empty one.

    Raises:
        UsageError: something else has the name.
        WriteError: that can't be told.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder} is a file, and a directory is to be written: choose another name")
        if folder.exists() and any(path.name != _PARTIAL for path in folder.iterdir()):
            raise UsageError(f"{folder} is not empty: choose another directory, or remove this one first")
    except OSError as error:
        raise _refusal(folder, error) from None


@contextmanager
def new_folder(folder: Path, *, last: str) -> Iterator[Path]:
    """Hand out a temporary directory, and give it the name `folder` if the block succeeds.

    Where an empty `folder` is there, it stays, with its mode, and for whoever is in it: then the files move
    into it. Files get the mode that the user's umask asks for, and are flushed to the disk first. On any
    error the temporary directory is removed, and so is what was moved.

    Args:
        last: the file to be moved last: without it the directory is not whole.

    Raises:
        UsageError: `folder` is there and not empty.
        WriteError: the disk is full, permission is missing, or the file system failed.
    """
    check_new(folder)
    try:
        folder = folder.resolve()
    except (OSError, RuntimeError) as error:  # a link that leads to itself
        raise _refusal(folder, error) from None
    there = folder.is_dir()
    partial = folder / _PARTIAL if there else folder.with_name(f".{folder.name}{_PARTIAL}")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        partial.mkdir(parents=True)
        yield partial
        _flush(partial)
        if there:
            _move(partial, folder, last)
            files.sync_directory(folder)
        else:
            partial.rename(folder)
            files.sync_directory(folder.parent)
    except (OSError, SafetensorError) as error:
        raise _refusal(folder, error) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
    mode = folder.stat().st_mode & 0o666  # safetensors makes files that only their owner can read
    for path in folder.rglob("*"):
        if path.is_symlink():
            continue
        if path.is_dir():
            files.sync_directory(path)
            continue
        path.chmod(mode)
        with path.open("rb") as file:
            os.fsync(file.fileno())
    files.sync_directory(folder)


def _refusal(folder: Path, error: Exception) -> WriteError:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:150]
    return WriteError(f"{folder} can't be written ({reason}): mend that, then run the same command again")
