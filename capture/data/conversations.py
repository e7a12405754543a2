"""From rows to token ids and loss mask.

A conversation is rendered by the chat template, so that the draft sees exactly what the served model sees.
The loss mask is 1 on the tokens that the assistant generates: its content, its tool calls and its
end-of-turn token.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from capture.data.sources import RawRow
from capture.data.turns import Rendered, Span, render_turns, unmasked
from pipeline.cache.index import count_candidates, sample_id
from pipeline.chat.rows import (
    BadRowError,
    Content,
    Conversation,
    Text,
    Tokens,
    parse_line,
    read_row,
)
from pipeline.chat.template import ChatTemplate

# Reasoning at the start of a turn (opened by the turn or the prompt, closed or not), and closed reasoning
# later in it.
_TO_CLOSE = r"(?:(?!<think>).)*?</think>\s*"
_REASONING = re.compile(rf"\A\s*(?:<think>)?{_TO_CLOSE}|\A\s*<think>.*\Z|<think>{_TO_CLOSE}", re.DOTALL)

NO_CANDIDATE = "no two supervised tokens in a row"
TOO_LONG = "longer than --max-length"
BEYOND_LENGTH = "no answer within --max-length"
NO_ANSWER = "no assistant turn"
MASKED = "every answer to learn from is masked by the data's own keys"


@dataclass(frozen=True)
class TokenizedSample:
    """Token ids and loss mask of a row, cut after its last supervised token: no later token is used."""

    source_row: int
    input_ids: np.ndarray  # [S] int32
    loss_mask: np.ndarray  # [S] uint8

    @property
    def sample_id(self) -> bytes:
        """Content hash that names this sample in every cache."""
        return sample_id(self.input_ids, self.loss_mask)


class DroppedRowError(Exception):
    """A valid row that training can't use, or that the options exclude; `str()` is the reason."""


@dataclass(frozen=True, kw_only=True)
class RowTokenizer:
    """Turn a row into token ids and loss mask. It can be pickled for worker processes."""

    template: ChatTemplate
    vocab_size: int
    """Upper bound of the ids in tokenised rows."""
    supervise: Literal["all", "last"] = "all"
    """Supervise every assistant turn, or only the last one."""
    mask_reasoning: bool = False
    """Exclude <think>...</think> from the loss."""
    max_length: int = 4096
    too_long: Literal["cut", "drop"] = "cut"
    stop_ids: tuple[int, ...] = ()
    """Tokens at which generation stops, by the target's generation config."""

    def __call__(self, row: RawRow, form: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return a row's `input_ids` `[S]` int32 and `loss_mask` `[S]` uint8, of which the last is 1.

        Args:
            form: a name in `pipeline.chat.rows.FORMS`; None detects it from the row's keys.

        Raises:
            BadRowError: the row is invalid.
            DroppedRowError: the row is valid, but training can't use it, or the options exclude it.
        """
        return self.sample(self.read(row, form))

    def read(self, row: RawRow, form: str | None = None) -> Content:
        """Return a row's content. Raises BadRowError if the row is invalid."""
        return read_row(parse_line(row) if isinstance(row, bytes) else row, form)

    def sample(self, content: Content) -> tuple[np.ndarray, np.ndarray]:
        """Return `input_ids` `[S]` int32 and `loss_mask` `[S]` uint8 as `__call__` does."""
        if isinstance(content, Conversation):
            answers = {i for i, message in enumerate(content.messages) if message["role"] == "assistant"}
            if not answers:
                raise DroppedRowError(NO_ANSWER)
            learned = {max(answers)} if self.supervise == "last" else answers
            if learned <= content.masked:
                raise DroppedRowError(MASKED)
        ids, mask = _without_tail(*self.tokenize(content))
        if len(ids) > self.max_length and self.too_long == "drop":
            raise DroppedRowError(TOO_LONG)
        whole = count_candidates(mask)
        ids, mask = _without_tail(ids[: self.max_length], mask[: self.max_length])
        if count_candidates(mask) == 0:
            raise DroppedRowError(BEYOND_LENGTH if whole else NO_CANDIDATE)
        return ids, mask

    def tokenize(self, content: Conversation | Text | Tokens) -> tuple[np.ndarray, np.ndarray]:
        """Return token ids `[S]` int32 and loss mask `[S]` uint8 of the whole row, uncut."""
        if isinstance(content, Tokens):
            self._refuse_beyond(content.input_ids)  # before numpy, whose integers are bounded
            return np.array(content.input_ids, np.int32), np.array(content.loss_mask, np.uint8)
        if isinstance(content, Text):
            ids = np.array(self.template.tokenizer(content.text)["input_ids"], np.int64)
            mask = np.ones(len(ids), np.uint8)
        else:
            ids, mask = self._tokenize_conversation(content)
        self._refuse_beyond(ids.tolist())
        return ids.astype(np.int32), mask

    def _refuse_beyond(self, ids: Sequence[int]) -> None:
        """Refuse tokens that the target has no embedding for: a tokenizer can have more."""
        outside = next((i for i in ids if not 0 <= i < self.vocab_size), None)
        if outside is None:
            return
        tokenizer = self.template.tokenizer
        named = (
            f" ({tokenizer.convert_ids_to_tokens(outside)!r:.40})" if 0 <= outside < len(tokenizer) else ""
        )
        raise BadRowError(
            "tokens outside the vocabulary",
            f"token id {outside!s:.40}{named} is outside the target's vocabulary [0, {self.vocab_size}): use "
            "the tokenizer that the target was trained with, or leave out the row",
        )

    def _tokenize_conversation(self, content: Conversation) -> tuple[np.ndarray, np.ndarray]:
        rendered = render_turns(self.template, content)
        if not rendered.text.isascii() and any("\ud800" <= c <= "\udfff" for c in rendered.text):
            raise BadRowError(
                "not text",
                "the chat template renders half of a surrogate pair, which is no text: fix the row",
            )
        tokenizer = self.template.tokenizer
        encoded = tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)
        ids = np.array(encoded["input_ids"], np.int64)
        offsets = np.array(encoded["offset_mapping"]).reshape(-1, 2)
        spans = rendered.spans
        if content.masked:
            spans = unmasked(self.template, content, rendered)
        if self.supervise == "last":
            last = self._last_turn(content, rendered)
            spans = [span for span in last if span in spans]
        stops = () if self.template.has_marks(content.tools) else self.stop_ids
        mask = mask_spans(spans, ids, offsets, self.template.special_ids, stops)
        if self.mask_reasoning:
            mask[_reasoning_tokens(rendered.text, rendered.spans, offsets)] = 0
        return ids, mask

    def _last_turn(self, conversation: Conversation, rendered: Rendered) -> list[Span]:
        """Return the spans of the last assistant turn, which generation marks may have split."""
        last = max((i for i, m in enumerate(conversation.messages) if m["role"] == "assistant"), default=0)
        if not last:
            return rendered.spans[-1:]
        before = self.template.render(
            Conversation(conversation.messages[:last], conversation.tools), prompt=False
        )
        inside = [span for span in rendered.spans if span.start >= len(before)]
        return inside if rendered.text.startswith(before) else rendered.spans[-1:]


def _without_tail(ids: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cut after the last supervised token: no later token is used."""
    supervised = np.flatnonzero(mask)
    end = int(supervised[-1]) + 1 if len(supervised) else 0
    return ids[:end], mask[:end]


def mask_spans(
    spans: Sequence[Span],
    ids: np.ndarray,
    offsets: np.ndarray,
    special: Sequence[int],
    stops: Sequence[int] = (),
) -> np.ndarray:
    """Return the loss mask `[S]` uint8 of spans: each from its first token through its end-of-turn token.

    A span without an end-of-turn token is supervised through its content, and through the stop token right
    after it: some templates (GLM's, Apertus') write the token that ends an answer only before the next turn.
    Text that a template adds after the end-of-turn token (usually a line feed) is not generated by the model.

    Args:
        ids: `[S]`.
        offsets: start and end (exclusive) of each token in characters, `[S, 2]`.
        special: ids of special tokens.
        stops: ids of the tokens at which generation stops.
    """
    starts, ends_at = offsets.T
    mask = np.zeros(len(ids), dtype=np.uint8)
    is_special = np.isin(ids, special)
    for span in spans:
        reached = np.flatnonzero(ends_at > span.start)
        if not len(reached):
            continue
        content_end = span.end if span.whole else span.content_end
        inside = np.flatnonzero((starts < content_end) & (ends_at > span.start))
        ends = np.flatnonzero(is_special & (starts >= content_end) & (ends_at <= span.end))
        if not len(ends) and not len(inside):
            continue  # an empty answer without an end-of-turn token
        last = ends[0] if len(ends) else inside[-1]
        if not len(ends) and not is_special[last] and last + 1 < len(ids) and ids[last + 1] in stops:
            last += 1
        mask[reached[0] : last + 1] = 1
    return mask


def _reasoning_tokens(text: str, spans: Sequence[Span], offsets: np.ndarray) -> np.ndarray:
    """Return the mask `[S]` bool of tokens inside an assistant's reasoning."""
    starts, stops = offsets.T
    inside = np.zeros(len(offsets), dtype=bool)
    for span in spans:
        for match in _REASONING.finditer(text[span.start : span.end]):
            inside |= (starts >= span.start + match.start()) & (stops <= span.start + match.end())
    return inside
