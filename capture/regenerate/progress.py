"""The progress file: answers so far, from which a killed run continues.

Append-only JSON lines next to the output. The first line identifies the run; each further line is the
answer to one turn. The file exists until all rows are answered.
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
    """Return the progress file of `out`. A folder of data does not pick up its name."""
    return out.with_name(f"{out.name}.progress")


class Progress:
    """An open progress file, locked by one process at a time."""

    def __init__(
        self, path: Path, run: dict[str, Any], dialogues: Sequence[Dialogue], *, fresh: bool = False
    ):
        """Open or create the file, and add its answers to the dialogues.

        Args:
            run: settings that decide the answers. A file of a run with other settings is refused.
            fresh: discard the file's answers.

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
            raise DSparkError(
                f"{self._path}: another process writes this output: choose another --out"
            ) from None

    def _load(self, run: dict[str, Any], dialogues: Sequence[Dialogue]) -> None:
        """Read the complete lines. Cut off what follows a torn or wrong line: its turns are asked again."""
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
            raise UsageError(f"{self._path}: not a progress file of this version: start over with --fresh")
        differing = [name for name in {**theirs, **run} if theirs.get(name) != run.get(name)]
        if differing:
            words = "; ".join(f"{name} {_short(theirs, name)}, not {_short(run, name)}" for name in differing)
            raise UsageError(
                f"{self._path} is the progress of another run, with {words}: repeat that command to "
                "continue it, or start over with --fresh"
            )

    def record(self, answers: Sequence[tuple[Dialogue, Answer]]) -> None:
        """Write the answers to these dialogues' next turns. After it returns, a kill does not lose them."""
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
        """Close the file and release its lock."""
        self._file.close()

    def remove(self) -> None:
        """Remove the file, after all rows are answered."""
        self._path.unlink()


def _parse(line: bytes) -> dict[str, Any] | None:
    """Return a line's record; None for a torn line."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _restore(record: dict[str, Any], dialogues: Sequence[Dialogue]) -> bool:
    """Add a recorded answer to its dialogue. Return False if it does not fit, as in a damaged file."""
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
