"""An engine at work on an export, and its answer."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipeline.errors import RunError
from pipeline.text import one_line

# Seconds in which a process that was asked to end does so, before it is killed.
GRACE = 10
# Seconds without a line or an answer after which a process hangs.
SILENCE = 1800


@dataclass(frozen=True)
class Answer:
    """Greedy answers of an engine to the prompts."""

    version: str
    """Name and version of the engine."""
    texts: list[list[int]]
    """New tokens of each prompt."""
    drafts: list[list[list[int]]]
    """Drafted tokens of each prompt, round after round. Empty without a draft."""
    seconds: float
    """Seconds of all prompts, with processing them, without loading."""

    @property
    def token_ms(self) -> float:
        """Milliseconds per token."""
        return 1000 * self.seconds / max(sum(map(len, self.texts)), 1)


class Engine(Protocol):
    """An engine that serves a target, with or without a draft."""

    name: str

    def serve(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, draft: Path | None) -> Answer:
        """Decode prompts greedily, one after the other.

        Args:
            prompts: token ids.
            draft: an export; None decodes with the target alone.

        Raises:
            RunError: the engine can't be started, or it failed.
        """


@contextmanager
def started(
    command: Sequence[str | Path], log: Path, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen]:
    """Start a process, and end it and all that it started when the block ends, however it ends.

    Args:
        log: file of its output.
        environment: variables besides this process's own.

    Raises:
        RunError: it can't be started.
    """
    process = None
    try:
        with log.open("wb") as output:
            process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,  # Ctrl-C is ours to pass on, and a group can be ended whole
            )
        yield process
    except OSError as error:
        if process is not None:
            raise
        raise RunError(f"{command[0]} can't be started ({error.strerror}): is it the engine's?") from None
    finally:
        if process is not None:
            _end(process)


def _end(process: subprocess.Popen) -> None:
    """End a process's whole group. A second Ctrl-C ends the patience, not the ending."""
    try:
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(GRACE)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run(command: Sequence[str | Path], log: Path, environment: Mapping[str, str] | None = None) -> None:
    """Run a process to its end.

    Raises:
        RunError: it can't be started, fails, or says nothing for too long.
    """
    with started(command, log, environment) as process:
        while (code := _ended(process)) is None:
            if time.time() - log.stat().st_mtime > SILENCE:
                raise RunError(f"{Path(command[0]).name} has said nothing for {SILENCE} s; see {log}")
        if code != 0:
            raise failed(Path(command[0]).name, log)


def _ended(process: subprocess.Popen) -> int | None:
    """Return a process's exit code, None if it is at work after a second."""
    try:
        return process.wait(1)
    except subprocess.TimeoutExpired:
        return None


def failed(name: str, log: Path) -> RunError:
    """Return the error for a process that failed: its last line, and where the others are."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    last = one_line(lines[-1]) if lines else "it said nothing"
    return RunError(f"{name} failed: {last}; all of its output is in {log}")
