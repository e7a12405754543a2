"""Standard input as data: kept in a temporary file, because data is read more than once."""

from __future__ import annotations

import atexit
import functools
import shutil
import sys
import tempfile
from pathlib import Path

from pipeline.chat.rows import BadRowError, detect_form, parse_line
from pipeline.errors import DataError, UsageError
from pipeline.files import write_error
from pipeline.process import torchrun_place

STDIN = "-"
"""Value of `--data` that stands for standard input."""


def spool_stdin() -> Path:
    """Copy standard input to a temporary file, removed at exit, with the suffix of JSONL or JSON.

    Raises:
        UsageError: several processes would need it, or it is a terminal or closed.
        DataError: it is empty.
    """
    if torchrun_place().world > 1:
        raise UsageError("--data - can't be read by several processes: write it to a file first")
    if sys.stdin is None or sys.stdin.closed or sys.stdin.isatty():
        raise UsageError(
            "--data - reads rows from standard input: pipe JSONL into it, as in cat FILE | dspark ..."
        )
    folder = Path(tempfile.mkdtemp(prefix="dspark-stdin-"))
    atexit.register(functools.partial(shutil.rmtree, folder, ignore_errors=True))
    path = folder / "stdin.jsonl"
    try:
        with path.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file, 2**20)
    except OSError as error:
        raise write_error(path, error) from None
    if not path.stat().st_size:
        raise DataError("--data - got nothing: standard input is empty")
    return path if _is_lines(path) else path.rename(path.with_suffix(".json"))


def _is_lines(path: Path) -> bool:
    """Return whether the first line is a row by itself: an object of a known form, or one of several."""
    with path.open("rb") as file:
        lines = (line for line in file if line.strip())
        try:
            row = parse_line(next(lines, b""))
        except BadRowError:
            return False
        return detect_form(row) is not None or next(lines, None) is not None
