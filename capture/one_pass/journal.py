"""Answers on disk, before anything is made of them: a killed capture never answers a turn in two ways.

One file per shard, `progress/answers-00012.jsonl`, written by the process that holds the shard: a line per
answer, with the sample's number in the shard, the turn's number, a hash of the tokens before it, its tokens,
and whether the target ended it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from capture.one_pass.turns import Conversation, Turn
from pipeline.files import write_error


class Journal:
    """The answers of one shard."""

    def __init__(self, path: Path):
        self._path = path

    def read(self, conversations: Sequence[Conversation]) -> None:
        """Give conversations their answers so far. A torn last line is cut off.

        Of two answers to one turn, which two owners of the shard may have written, the first one holds, and
        answers that follow the other one are passed over.
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

    def add(self, sample: int, conversation: Conversation, turn: Turn) -> None:
        """Append the answer to a conversation's next turn. It is on disk afterwards.

        Args:
            sample: the conversation's number in the shard.

        Raises:
            WriteError: the file can't be written.
            FileNotFoundError: the folder is gone, because another process completed the cache.
        """
        record = {
            "sample": sample,
            "turn": len(conversation.answers),
            "prompt": conversation.prompt_hash(),
            "tokens": turn.tokens,
            "finished": turn.finished,
        }
        try:
            with self._path.open("ab", buffering=0) as file:
                file.write(f"{json.dumps(record)}\n".encode())
                os.fsync(file.fileno())
        except FileNotFoundError:
            raise
        except OSError as error:
            raise write_error(self._path, error) from error


def _restore(line: bytes, conversations: Sequence[Conversation]) -> None:
    """Add a line's answer to its conversation, if it is one to the tokens that come before it there."""
    try:
        record = json.loads(line)
        number, turn = record["sample"], Turn(tuple(record["tokens"]), bool(record["finished"]))
        conversation = conversations[number]
        follows = record["turn"] == len(conversation.answers)
        follows = follows and record["prompt"] == conversation.prompt_hash()
    except (ValueError, KeyError, IndexError, TypeError):
        return
    if number >= 0 and follows and conversation.fits(turn):
        conversation.answers.append(turn)
