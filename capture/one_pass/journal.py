"""Answers on disk, before anything is made of them: a killed capture never answers a turn in two ways.

One file per shard, `progress/answers-00012.jsonl`, written by the process that holds the shard: a line per
answer, with the sample's number in the shard, the turn's number, the tokens, and whether the target ended it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from capture.one_pass.turns import Conversation, Turn
from pipeline.cache.manifest import PROGRESS


def answers_file(cache: Path, shard: int) -> Path:
    """Return the file of a shard's answers."""
    return cache / PROGRESS / f"answers-{shard:05d}.jsonl"


class Journal:
    """The answers of one shard."""

    def __init__(self, path: Path):
        self._path = path

    def read(self, conversations: Sequence[Conversation]) -> None:
        """Give conversations their answers so far. What follows a torn line is cut off."""
        try:
            lines = self._path.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return
        whole = 0
        for line in lines:
            if not _restore(line, conversations):
                break
            whole += len(line)
        if whole < sum(map(len, lines)):
            with self._path.open("r+b") as file:
                file.truncate(whole)

    def add(self, answers: Sequence[tuple[int, int, Turn]]) -> None:
        """Append answers: a sample's number, a turn's number, and the answer. They are on disk afterwards."""
        lines = [
            json.dumps({"sample": sample, "turn": number, "tokens": turn.tokens, "finished": turn.finished})
            for sample, number, turn in answers
        ]
        with self._path.open("ab") as file:
            file.write("".join(f"{line}\n" for line in lines).encode())
            file.flush()
            os.fsync(file.fileno())


def _restore(line: bytes, conversations: Sequence[Conversation]) -> bool:
    """Add a line's answer to its conversation. Return False if the line is torn, or of other data."""
    try:
        record = json.loads(line) if line.endswith(b"\n") else {}
        conversation = conversations[record["sample"]]
        turn = Turn(tuple(map(int, record["tokens"])), bool(record["finished"]))
    except (ValueError, KeyError, IndexError, TypeError):
        return False
    if record["turn"] != len(conversation.answers) or not turn.tokens:
        return False
    conversation.answers.append(turn)
    return True
