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
        """Give conversations their answers so far. A torn last line is cut off.

        Of two answers to one turn, which two owners of the shard may have written, the first one holds.
        """
        try:
            lines = self._path.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return
        if lines and not lines[-1].endswith(b"\n"):
            with self._path.open("r+b") as file:
                file.truncate(sum(map(len, lines[:-1])))
            lines.pop()
        for line in lines:
            _restore(line, conversations)

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


def _restore(line: bytes, conversations: Sequence[Conversation]) -> None:
    """Add a line's answer to its conversation, unless it is another answer to a turn that has one."""
    try:
        record = json.loads(line)
        conversation = conversations[record["sample"]]
        turn = Turn(tuple(map(int, record["tokens"])), bool(record["finished"]))
        number = record["turn"]
    except (ValueError, KeyError, IndexError, TypeError):
        return
    if turn.tokens and number == len(conversation.answers):
        conversation.answers.append(turn)
