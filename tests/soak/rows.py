"""Rows of the soak: short ones, and one in a thousand for each bad kind. Each knows what it becomes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerFast

from tests.soak.target import BEYOND, INFINITE, MAX_LENGTH, NAN, TOO_LARGE, ZERO
from tests.tiny import WORDS

GOOD = ""
"""The reason of a row that becomes a sample."""
SOURCES = ("chats.jsonl", "turns.jsonl", "tokens.jsonl")
STATES = ("states not finite", "states all zero", "does not fit the device")
"""Reasons that only the target can find."""
SHARES = (0.7, 0.15, 0.15)
"""Shares of the sources in all rows."""
PER_KIND = 1000
"""Rows among which there is one of each bad kind."""


@dataclass(frozen=True)
class Row:
    """A line of a source."""

    line: str
    kind: str
    """Name of the kind of bad row."""
    reason: str = GOOD
    """Reason under which it is counted as dropped."""
    input_ids: tuple[int, ...] = ()
    """Of a sample: ids and loss mask, worked out here."""
    loss_mask: tuple[int, ...] = ()


class Maker:
    """Makes rows from a seed.

    Args:
        tokenizer: the target's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int):
        self._tokenizer, self._chance = tokenizer, random.Random(seed)
        self._number = 0
        self._start, self._end, *self._spoilers = tokenizer.convert_tokens_to_ids(
            ["<|im_start|>", "<|im_end|>", NAN, INFINITE, ZERO]
        )
        self._feed = self._encode("\n")

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def words(self, low: int, high: int) -> str:
        """Return random words."""
        return " ".join(self._chance.choices(WORDS, k=self._chance.randint(low, high)))

    def unique(self) -> str:
        """Return a word that no other row has, so that no two rows are equal by chance."""
        self._number += 1
        return f"{self._number:x}"

    def turns(self, answer: str = "") -> list[tuple[str, str]]:
        """Return one or two questions with answers; the last one ends with `answer`."""
        found = []
        for _ in range(self._chance.randint(1, 2)):
            found += [
                ("user", f"{self.words(1, 5)} {self.unique()}"),
                ("assistant", self.words(3, 12)),
            ]
        return [*found[:-1], ("assistant", f"{found[-1][1]} {answer}".strip())]

    def chat(self, kind: str, reason: str, turns: list[tuple[str, str]]) -> Row:
        """Return a row of OpenAI's form."""
        line = json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]})
        return Row(line, kind, reason, *self._chatml(turns))

    def sharegpt(self, kind: str, reason: str, turns: list[tuple[str, str]]) -> Row:
        """Return a row of ShareGPT's form."""
        names = {"user": "human", "assistant": "gpt"}
        line = json.dumps(
            {"conversations": [{"from": names.get(role, role), "value": text} for role, text in turns]}
        )
        return Row(line, kind, reason, *self._chatml(turns))

    def tokens(self, kind: str, reason: str, ids: list[int]) -> Row:
        """Return a tokenised row whose first four tokens are not supervised."""
        mask = [0] * 4 + [1] * (len(ids) - 4)
        line = json.dumps({"input_ids": ids, "loss_mask": mask})
        return Row(line, kind, reason, tuple(ids), tuple(mask))

    def ids(self, low: int, high: int) -> list[int]:
        """Return random ids that spoil nothing."""
        return [
            self._chance.randrange(3, min(self._spoilers)) for _ in range(self._chance.randint(low, high))
        ]

    def _chatml(self, turns: list[tuple[str, str]]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return ids and mask of a chat by hand: content and end of turn of each answer are supervised."""
        ids: list[int] = []
        mask: list[int] = []
        for role, text in turns:
            begin, content = [self._start, *self._encode(f"{role}\n")], [*self._encode(text), self._end]
            ids += begin + content + self._feed
            mask += [0] * len(begin) + [int(role == "assistant")] * len(content) + [0] * len(self._feed)
        end = len(mask) - mask[::-1].index(1) if 1 in mask else 0
        return tuple(ids[:end]), tuple(mask[:end])

    # Good rows, and bad ones by source

    def good(self, source: int) -> Row:
        """Return a row that becomes a sample."""
        if source == 2:
            return self.tokens("good", GOOD, self.ids(10, 60))
        return (self.chat, self.sharegpt)[source]("good", GOOD, self.turns())

    def bad(self, source: int, good: Callable[[], Row]) -> list[Row]:
        """Return one bad row of each kind that a source can have.

        Args:
            good: returns an earlier good row of the source, for the duplicate.
        """
        copied = good()
        duplicate = Row(copied.line, "a duplicate", "a duplicate")
        return [duplicate, *(self._bad_chats, self._bad_turns, self._bad_tokens)[source]()]

    def _bad_chats(self) -> list[Row]:
        question, answer = {"role": "user", "content": self.words(1, 5)}, self.words(3, 9)
        image = {"type": "image_url", "image_url": {"url": "file:///a.png"}}
        pictured = {"role": "user", "content": [{"type": "text", "text": "what is this"}, image]}
        reply = {"role": "assistant", "content": answer}
        lines = [
            ("not JSON", "bad row, not JSON", '{"messages": [{"role": "user"'),
            ("not an object", "bad row, not a JSON object", json.dumps([question, reply])),
            ("an empty row", "bad row, another form", "{}"),
            ("no messages", "bad row, no messages", json.dumps({"messages": []})),
            ("no role", "bad row, malformed message", json.dumps({"messages": [{"content": answer}]})),
            ("an image", "bad row, not text", json.dumps({"messages": [pictured, reply]})),
            ("half a surrogate pair", "bad row, not text", json.dumps({"messages": [question, reply]})),
        ]
        lines[-1] = (*lines[-1][:2], lines[-1][2].replace(answer, answer + " \\ud83d"))
        long = [("user", self.words(MAX_LENGTH, MAX_LENGTH)), ("assistant", answer)]
        return [
            *(Row(line, kind, reason) for kind, reason, line in lines),
            self.chat(
                "an empty answer", "no two supervised tokens in a row", [("user", answer), ("assistant", "")]
            ),
            self.chat("an answer beyond --max-length", "no answer within --max-length", long),
            self.chat(
                "a token beyond the embedding", "bad row, tokens outside the vocabulary", self.turns(BEYOND)
            ),
            self.chat("NaN", STATES[0], self.turns(NAN)),
            self.chat("infinity", STATES[0], self.turns(INFINITE)),
        ]

    def _bad_turns(self) -> list[Row]:
        turns = self.turns()
        return [
            self.sharegpt("an unknown role", "bad row, unknown role", [("narrator", "it rains"), *turns]),
            Row(
                json.dumps(
                    {"conversations": [{"from": "human", "value": 7}, {"from": "gpt", "value": "no"}]}
                ),
                "not text",
                "bad row, malformed message",
            ),
        ]

    def _bad_tokens(self) -> list[Row]:
        zero = self._spoilers[-1]
        ids = self.ids(10, 60)
        self._number += 1
        return [
            self.tokens(
                "an id beyond the embedding", "bad row, tokens outside the vocabulary", [*ids, zero + 1]
            ),
            Row(
                json.dumps({"input_ids": ids, "loss_mask": [1]}),
                "lengths that differ",
                "bad row, malformed tokens",
            ),
            self.tokens("zeros", STATES[1], [zero] * (20 + self._number % 600)),
            self.tokens("too large", STATES[2], self.ids(TOO_LARGE, MAX_LENGTH)),
        ]


def make_rows(tokenizer: PreTrainedTokenizerFast, number: int, seed: int = 0) -> list[list[Row]]:
    """Return the rows of each source, about `number` in all."""
    maker, chance = Maker(tokenizer, seed), random.Random(seed)
    sources = []
    for source, share in enumerate(SHARES):
        rows = [maker.good(source) for _ in range(max(40, round(number * share)))]
        good = list(rows)
        for _ in range(max(1, number // PER_KIND)):
            for row in maker.bad(source, lambda good=good: chance.choice(good[: len(good) // 4])):
                low = len(rows) // 2 if row.kind == "a duplicate" else 1
                rows.insert(chance.randrange(low, len(rows)), row)
        sources.append(rows)
    return sources


def write_rows(folder: Path, sources: list[list[Row]]) -> list[Path]:
    """Write the sources' files and return their paths."""
    paths = [folder / name for name in SOURCES]
    for path, rows in zip(paths, sources, strict=True):
        path.write_text("".join(f"{row.line}\n" for row in rows))
    return paths
