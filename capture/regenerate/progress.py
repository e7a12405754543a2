"""The progress file: answers as they come, so that a killed run continues where it stopped.

Append-only JSON lines beside the output. The first says which run it belongs to; each further one is
the answer to one turn. It is there exactly as long as rows are still to be answered.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from capture.regenerate.dialogue import Answer, Dialogue
from pipeline.errors import DSparkError, UsageError

_VERSION = 1


def progress_path(out: Path) -> Path:
    """Where the progress of a run that writes `out` is kept; no name that a folder of data would pick up."""
    return out.with_name(f"{out.name}.progress")


class Progress:
    """An open progress file, which one process holds at a time."""

    def __init__(
        self, path: Path, run: dict[str, Any], dialogues: Sequence[Dialogue], *, fresh: bool = False
    ):
        """Open or start the file, and put the answers that it holds into the dialogues.

        Args:
            run: what decides the answers; a file of a run that differs in any of it is refused.
            fresh: forget what the file holds.

        Raises:
            UsageError: the file belongs to another run.
            DSparkError: another process is writing it.
        """
        self._path = path
        self._file = path.open("a+b")
        try:
            self._lock()
            if fresh:
                self._file.truncate(0)
            self._load(json.loads(json.dumps(run)), dialogues)
        except BaseException:
            self._file.close()
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DSparkError(f"{self._path}: another process is at work on this output") from None

    def _load(self, run: dict[str, Any], dialogues: Sequence[Dialogue]) -> None:
        """Read as far as the lines are whole; what a kill tore off behind is cut away and asked again."""
        self._file.seek(0)
        header, whole = None, 0
        for line in self._file:
            record = _parse(line)
            if record is None:
                break
            if header is None:
                header = record
                self._check(header, run)
            elif not _restore(record, dialogues):
                break
            whole += len(line)
        self._file.truncate(whole)
        if header is None:
            self._append([{"version": _VERSION, "run": run}])

    def _check(self, header: dict[str, Any], run: dict[str, Any]) -> None:
        theirs = header.get("run")
        if header.get("version") != _VERSION or not isinstance(theirs, dict):
            raise UsageError(f"{self._path}: not a progress file of this version; --fresh starts over")
        differing = [name for name in {**theirs, **run} if theirs.get(name) != run.get(name)]
        if differing:
            words = "; ".join(f"{name} {_short(theirs, name)}, not {_short(run, name)}" for name in differing)
            raise UsageError(
                f"{self._path} is the progress of another run, with {words}: repeat that command to "
                "continue it, or start over with --fresh"
            )

    def record(self, answers: Sequence[tuple[Dialogue, Answer]]) -> None:
        """Keep the answers to these dialogues' next turns. Once it returns, a kill doesn't lose them."""
        self._append(
            [
                {"row": dialogue.number, "turn": len(dialogue.answers), "answer": answer}
                for dialogue, answer in answers
            ]
        )

    def _append(self, records: list[dict[str, Any]]) -> None:
        lines = "".join(json.dumps(record) + "\n" for record in records)
        self._file.write(lines.encode())
        self._file.flush()

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()

    def remove(self) -> None:
        """Remove the file: nothing is left to answer."""
        self._path.unlink()


def _parse(line: bytes) -> dict[str, Any] | None:
    """A whole line's record; None for a torn one."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _restore(record: dict[str, Any], dialogues: Sequence[Dialogue]) -> bool:
    """Put a recorded answer into its dialogue; False where it doesn't fit, as in a damaged file."""
    number, turn, answer = record.get("row"), record.get("turn"), record.get("answer")
    if type(number) is not int or not 0 <= number < len(dialogues) or not isinstance(answer, dict):
        return False
    dialogue = dialogues[number]
    if turn != len(dialogue.answers) or dialogue.finished:
        return False
    dialogue.answers.append(answer)
    return True


def _short(run: dict[str, Any], name: str) -> str:
    text = str(run.get(name, "unset"))
    return f"{text[:12]}..." if len(text) == 64 else text  # a hash
