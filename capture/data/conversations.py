"""Rows to token ids and loss mask.

A conversation is rendered by the chat template, so that the draft sees exactly what the served model
will see; the loss mask is 1 on what the assistant itself would generate: its content, its tool calls and
its end-of-turn token.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from capture.data.sources import RawRow, open_sources
from capture.data.turns import Rendered, Span, render_turns
from pipeline.cache.index import count_candidates, sample_id
from pipeline.chat.rows import FORM_KEYS, BadRowError, Conversation, Text, Tokens, parse_line, read_row
from pipeline.chat.template import ChatTemplate
from pipeline.errors import DataError

# Thoughts: those a turn starts with (it or the prompt opened them; closed or not), and closed ones later on.
_THOUGHT = r"(?:(?!<think>).)*?</think>\s*"
_REASONING = re.compile(rf"\A\s*(?:<think>)?{_THOUGHT}|\A\s*<think>.*\Z|<think>{_THOUGHT}", re.DOTALL)

NO_CANDIDATE = "no two supervised tokens in a row"
TOO_LONG = "longer than --max-length"


@dataclass(frozen=True)
class TokenizedSample:
    """A conversation, cut after its last supervised token: nothing after it is ever used."""

    source_row: int
    input_ids: np.ndarray  # [S] int32
    loss_mask: np.ndarray  # [S] uint8

    @property
    def sample_id(self) -> bytes:
        """The content hash that names this sample in every cache."""
        return sample_id(self.input_ids, self.loss_mask)


class DroppedRowError(Exception):
    """A good row that training can't use, or that the options leave out; `str()` is why."""


@dataclass(frozen=True, kw_only=True)
class RowTokenizer:
    """Turns a row into token ids and loss mask. Holds no open files, so that worker processes can have it."""

    template: ChatTemplate
    vocab_size: int
    """Ids of rows that come tokenised must lie below."""
    supervise: Literal["all", "last"] = "all"
    """Every assistant turn, or the last one only."""
    mask_reasoning: bool = False
    """Whether <think>...</think> is left out of the loss."""
    max_length: int = 4096
    too_long: Literal["cut", "drop"] = "cut"

    def __call__(self, row: RawRow, form: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """A row's `input_ids` `[S]` int32 and `loss_mask` `[S]` uint8, ending supervised.

        Args:
            form: a name in `pipeline.chat.rows.FORMS`; None takes the row as what its keys say.

        Raises:
            BadRowError: the row can't be used, through a fault of its own.
            DroppedRowError: it can't be used as the options stand.
        """
        ids, mask = self.tokenize(read_row(parse_line(row) if isinstance(row, bytes) else row, form))
        ids, mask = _without_tail(ids, mask)
        if len(ids) > self.max_length and self.too_long == "drop":
            raise DroppedRowError(TOO_LONG)
        ids, mask = _without_tail(ids[: self.max_length], mask[: self.max_length])
        if count_candidates(mask) == 0:
            raise DroppedRowError(NO_CANDIDATE)
        return ids, mask

    def tokenize(self, content: Conversation | Text | Tokens) -> tuple[np.ndarray, np.ndarray]:
        """Token ids `[S]` int32 and loss mask `[S]` uint8 of the whole row, uncut."""
        if isinstance(content, Tokens):
            if any(not 0 <= token < self.vocab_size for token in content.input_ids):
                raise BadRowError(
                    "tokens outside the vocabulary", f"a token id outside [0, {self.vocab_size})"
                )
            return np.array(content.input_ids, np.int32), np.array(content.loss_mask, np.uint8)
        tokenizer = self.template.tokenizer
        if isinstance(content, Text):
            ids = np.array(tokenizer(content.text)["input_ids"], np.int32)
            return ids, np.ones(len(ids), np.uint8)
        rendered = render_turns(self.template, content)
        if not rendered.text.isascii() and any("\ud800" <= c <= "\udfff" for c in rendered.text):
            raise BadRowError(
                "not text", "half of a surrogate pair, which is no text, is rendered: fix the row"
            )
        encoded = tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)
        ids = np.array(encoded["input_ids"], np.int32)
        offsets = np.array(encoded["offset_mapping"]).reshape(-1, 2)
        spans = self._last_turn(content, rendered) if self.supervise == "last" else rendered.spans
        mask = mask_spans(spans, ids, offsets, self.template.special_ids)
        if self.mask_reasoning:
            mask[_reasoning_tokens(rendered.text, rendered.spans, offsets)] = 0
        return ids, mask

    def _last_turn(self, conversation: Conversation, rendered: Rendered) -> list[Span]:
        """The spans of the last assistant turn, which generation marks may have split."""
        last = max((i for i, m in enumerate(conversation.messages) if m["role"] == "assistant"), default=0)
        if not last:
            return rendered.spans[-1:]
        before = self.template.render(
            Conversation(conversation.messages[:last], conversation.tools), prompt=False
        )
        inside = [span for span in rendered.spans if span.start >= len(before)]
        return inside if rendered.text.startswith(before) else rendered.spans[-1:]


def _without_tail(ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cut behind the last supervised token: nothing after it is ever used."""
    supervised = np.flatnonzero(mask)
    end = int(supervised[-1]) + 1 if len(supervised) else 0
    return ids[:end], mask[:end]


def mask_spans(
    spans: Sequence[Span], ids: np.ndarray, offsets: np.ndarray, special: Sequence[int]
) -> np.ndarray:
    """Supervise each span from its first token through its end-of-turn token, if it has one: `[S]` uint8.

    What a template adds behind that token (a line feed, mostly) is the template's, not the model's.

    Args:
        ids: `[S]`.
        offsets: first character and the one behind the last, of each token, `[S, 2]`.
        special: ids of special tokens.
    """
    starts, stops = offsets.T
    mask = np.zeros(len(ids), dtype=np.uint8)
    is_special = np.isin(ids, special)
    for span in spans:
        reached = np.flatnonzero(stops > span.start)
        if not len(reached):
            continue
        content_end = span.end if span.whole else span.content_end
        inside = np.flatnonzero((starts < content_end) & (stops > span.start))
        ends = np.flatnonzero(is_special & (starts >= content_end) & (stops <= span.end))
        if not len(ends) and not len(inside):
            continue  # an empty answer without an end-of-turn token
        last = ends[0] if len(ends) else inside[-1]
        mask[reached[0] : last + 1] = 1
    return mask


def _reasoning_tokens(text: str, spans: Sequence[Span], offsets: np.ndarray) -> np.ndarray:
    """Which tokens lie within an assistant's thoughts: `[S]` bool."""
    starts, stops = offsets.T
    inside = np.zeros(len(offsets), dtype=bool)
    for span in spans:
        for match in _REASONING.finditer(text[span.start : span.end]):
            inside |= (starts >= span.start + match.start()) & (stops <= span.start + match.end())
    return inside


def read_conversations(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """The conversations of a source, each with its place; keys beside the messages are kept.

    Rows with `messages` are given as they are, those of another form as `messages`.

    Raises:
        DataError: a row that is no conversation, by its place; or no row at all.
    """
    rows = []
    for source in open_sources((str(path),)):
        for number, raw in source.rows():
            try:
                row = parse_line(raw) if isinstance(raw, bytes) else raw
                content = read_row(row)
                if not isinstance(content, Conversation):
                    raise BadRowError("no conversation", "expected a conversation, got text or tokens")
            except BadRowError as problem:
                raise DataError(f"{source.at(number)}: {problem}") from None
            if "messages" not in row:
                row = {key: value for key, value in row.items() if key not in FORM_KEYS}
                row |= {"messages": content.messages} | ({"tools": content.tools} if content.tools else {})
            rows.append((source.at(number), row))
    if not rows:
        raise DataError(f"{path}: no rows: expected one conversation a line")
    return rows


def render(
    tokenizer: Any, messages: list[dict[str, Any]], where: str, *, prompt: bool = False, **kwargs: Any
) -> Any:
    """Apply the tokenizer's chat template. Raises DataError, saying where, when the template refuses."""
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, **kwargs)
    except Exception as error:  # templates raise what they like: jinja errors, KeyError, ...
        reason = " ".join(str(error).split())
        raise DataError(f"{where}: the chat template refuses this conversation: {reason}") from None
