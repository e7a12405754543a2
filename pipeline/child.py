"""Processes that this one starts, such as engines, and their end."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pipeline.errors import EngineError
from pipeline.text import one_line

# Seconds in which a process that was asked to end does so, before it is killed.
GRACE = 10
# Seconds without a line or an answer after which a process hangs.
SILENCE = 1800


def start(
    command: Sequence[str | Path],
    log: Path,
    environment: Mapping[str, str] | None = None,
    without: Collection[str] = (),
    **popen: Any,
) -> subprocess.Popen:
    """Start a process in a group of its own. `end` must end it.

    Args:
        log: file of its output.
        environment: variables besides this process's own.
        without: variables of this process's that it does not get.
        popen: arguments of `subprocess.Popen`; its standard input is empty by default.

    Raises:
        EngineError: it can't be started.
    """
    kept = {name: value for name, value in os.environ.items() if name not in without}
    with log.open("wb") as output:
        try:
            return subprocess.Popen(
                [str(part) for part in command],
                **{"stdin": subprocess.DEVNULL, "stdout": output, **popen},
                stderr=subprocess.STDOUT,
                env={**kept, **(environment or {})},
                start_new_session=True,  # Ctrl-C is ours to pass on, and a group can be ended whole
            )
        except OSError as error:
            raise EngineError(
                f"{command[0]} can't be started ({error.strerror}): is it the engine's?"
            ) from None


def end(process: subprocess.Popen) -> None:
    """End a process's whole group. A second Ctrl-C ends the patience, not the ending."""
    try:
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(GRACE)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def started(
    command: Sequence[str | Path], log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen]:
    """Start a process, and end it and all that it started when the block ends, however it ends.

    Raises:
        EngineError: it can't be started.
    """
    process = start(command, log, environment)
    try:
        yield process
    finally:
        end(process)


def last_line(log: Path) -> str:
    """Return the last line that a process printed."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return one_line(lines[-1]) if lines else "it said nothing"


def failed(name: str, log: Path) -> EngineError:
    """Return the error for a process that failed: its last line, and where the others are."""
    return EngineError(f"{name} failed: {last_line(log)}; all of its output is in {log}")
