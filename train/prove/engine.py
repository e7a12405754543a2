"""An engine at work on an export, and its answer."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pipeline.child import SILENCE, failed, started
from pipeline.errors import EngineError


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
            EngineError: the engine can't be started, or it failed.
        """


def run(command: Sequence[str | Path], log: Path, environment: Mapping[str, str] | None = None) -> None:
    """Run a process to its end.

    Raises:
        EngineError: it can't be started, fails, or says nothing for too long.
    """
    with started(command, log, environment) as process:
        while (code := _ended(process)) is None:
            if time.time() - log.stat().st_mtime > SILENCE:
                raise EngineError(f"{Path(command[0]).name} has said nothing for {SILENCE} s; see {log}")
        if code != 0:
            raise failed(Path(command[0]).name, log)


def _ended(process: subprocess.Popen) -> int | None:
    """Return a process's exit code, None if it is at work after a second."""
    try:
        return process.wait(1)
    except subprocess.TimeoutExpired:
        return None
