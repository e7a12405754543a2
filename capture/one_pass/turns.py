"""The turns of a sample that the target answers again, token by token.

Every run of supervised tokens is one turn. It is replaced by the target's own answer; all other tokens stay,
so each answer follows the prompt, the target's own earlier answers, and the template's tokens between them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from capture.data.conversations import TokenizedSample
from pipeline.cache import count_candidates
from pipeline.cache.skipped import FAILED, TOO_SHORT


@dataclass(frozen=True)
class Turn:
    """A turn's answer."""

    tokens: tuple[int, ...]
    finished: bool
    """True if the target ended it; False if it reached a limit."""


class Conversation:
    """A sample of the data, and the answers to its turns so far.

    Args:
        sample: with at least one supervised token.
        max_length: maximum tokens of the whole.
        max_new_tokens: maximum tokens of an answer.
    """

    def __init__(self, sample: TokenizedSample, max_length: int, max_new_tokens: int):
        self.sample = sample
        self.answers: list[Turn] = []
        self._spans = supervised_spans(sample.loss_mask)
        self._max_length, self._max_new = max_length, max_new_tokens

    def prompt(self) -> np.ndarray | None:
        """Return the tokens before the next answer, `[S]` int32; None if no turn is left that fits."""
        number = len(self.answers)
        if number == len(self._spans):
            return None
        parts = self._parts(number)
        prompt = np.concatenate([tokens for tokens, _ in parts])
        return prompt if len(prompt) < self._max_length or not number else None

    def prompt_hash(self) -> str:
        """Return the SHA-256 of the tokens before the next answer; empty if no turn is left that fits."""
        prompt = self.prompt()
        return "" if prompt is None else hashlib.sha256(prompt.astype("<i4").tobytes()).hexdigest()

    def fits(self, turn: Turn) -> bool:
        """Return whether this can be the next answer: token ids, not more than there is room for."""
        prompt = self.prompt()
        if prompt is None or not 0 < len(turn.tokens) <= self.room(prompt):
            return False
        return all(isinstance(token, int) and 0 <= token < 2**31 for token in turn.tokens)

    @property
    def at_last_turn(self) -> bool:
        """True if only one turn is left."""
        return len(self.answers) == len(self._spans) - 1

    def room(self, prompt: np.ndarray) -> int:
        """Return the maximum tokens of an answer to a prompt."""
        return max(1, min(self._max_new, self._max_length - len(prompt)))

    def seed(self, seed: int) -> int:
        """Return the seed of the next answer: of this content and turn, whatever else is answered."""
        content = self.sample.sample_id + f"{len(self.answers)} {seed}".encode()
        return int.from_bytes(hashlib.sha256(content).digest()[:4], "little") & 0x7FFFFFFF

    def answered(self) -> tuple[TokenizedSample, str | None]:
        """Return the sample with its answers, cut after the last one; and a reason to skip it, or None.

        In place of a sample that is skipped stands the shortest part of the data's own from which a draft
        could learn, because a cache holds no other. Its states are never read.
        """
        if not self.answers:
            return self._shortest(), FAILED
        parts = self._parts(len(self.answers), last=True)
        ids = np.concatenate([tokens for tokens, _ in parts]).astype(np.int32)
        mask = np.concatenate([np.full(len(tokens), own, np.uint8) for tokens, own in parts])
        if not count_candidates(mask):
            return self._shortest(), TOO_SHORT
        return TokenizedSample(self.sample.source_row, ids, mask), None

    def _shortest(self) -> TokenizedSample:
        end = shortest_length(self.sample.loss_mask)
        return TokenizedSample(
            self.sample.source_row, self.sample.input_ids[:end], self.sample.loss_mask[:end]
        )

    def _parts(self, number: int, last: bool = False) -> list[tuple[np.ndarray, bool]]:
        """Return the tokens before turn `number`, and whether each part is the target's own answer."""
        ids, parts, start = self.sample.input_ids, [], 0
        for turn, (begin, end) in zip(self.answers[:number], self._spans, strict=False):
            parts += [(ids[start:begin], False), (np.array(turn.tokens, np.int32), True)]
            if not turn.finished:  # the template's token that ends a turn
                parts.append((ids[end - 1 : end], False))
            start = end
        if not last:
            return [*parts, (ids[start : self._spans[number][0]], False)]
        return parts[:-1] if parts and not self.answers[-1].finished else parts


def supervised_spans(mask: np.ndarray) -> list[tuple[int, int]]:
    """Return first and one past the last token of each run of supervised tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def shortest_length(mask: np.ndarray) -> int:
    """Return the tokens up to the first two supervised ones in a row."""
    return int(np.flatnonzero(mask[:-1] & mask[1:])[0]) + 2


def longest_lengths(samples: Iterable[TokenizedSample], max_length: int, max_new_tokens: int) -> np.ndarray:
    """Return the most tokens that each sample can have once it is answered, `[n]`."""
    found = []
    for sample in samples:
        spans = supervised_spans(sample.loss_mask)
        others = len(sample.input_ids) - int(sample.loss_mask.sum())
        most = others + len(spans) * (max_new_tokens + 1)
        found.append(max(spans[0][0] + 1, shortest_length(sample.loss_mask), min(max_length, most)))
    return np.array(found, np.int64)
