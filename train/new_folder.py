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


def check_new(folder: Path) -> None:
    """Whether a directory can begin here: there is nothing yet, or an empty one.

    Raises:
        UsageError: something else has the name.
        WriteError: that can't be told.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"{folder} is a file, and a directory is to be written: choose another name")
        if folder.exists() and any(folder.iterdir()):
            raise UsageError(f"{folder} is not empty: choose another directory, or remove this one first")
    except OSError as error:
        raise _refusal(folder, error) from None


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Hand out a temporary directory beside `folder`, and give it that name if the block succeeds.

    Files get the mode that the user's umask asks for, and are flushed to the disk first. On any error the
    temporary directory is removed.

    Raises:
        UsageError: `folder` is there and not empty.
        WriteError: the disk is full, permission is missing, or the file system failed.
    """
    check_new(folder)
    folder = folder.resolve()
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
        partial.mkdir(parents=True)
        yield partial
        _flush(partial)
        partial.rename(folder)
        files.sync_directory(folder.parent)
    except (OSError, SafetensorError) as error:
        raise _refusal(folder, error) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


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
