"""Conversations to token ids and loss mask.

A row is `{"messages": [{"role": ..., "content": ...}, ...]}`, one JSON object a line. It is rendered
by the tokenizer's own chat template, so that the draft sees exactly what the served model will see;
the loss mask is 1 on what the assistant itself would generate: its content and end-of-turn token.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from pipeline.cache import count_candidates, sample_id
from pipeline.errors import DataError

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


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


@dataclass
class TokenizedData:
    """Every usable sample, and where every row went."""

    samples: list[TokenizedSample] = field(default_factory=list)
    rows: Counter[str] = field(default_factory=Counter)


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield `(row number from 0, row)` for every non-empty line.

    Raises:
        DataError: no such file, or a line that is not a JSON object, by line number.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no data file at {path}: expected a JSONL file of conversations; see --data")
    with path.open("rb") as file:
        for number, line in enumerate(file):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}:{number + 1}: not JSON ({error}); fix or remove the line") from None
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number + 1}: expected a JSON object, got {type(row).__name__}")
            yield number, row


def _messages_of(row: dict[str, Any], where: str) -> list[dict[str, Any]]:
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        keys = ", ".join(map(str, row)) or "none"
        raise DataError(
            f'{where}: expected a row with "messages": [{{"role": ..., "content": ...}}], got keys: {keys}'
        )
    for i, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f'{where}: message {i} has no "role": expected role and content')
        content = message.get("content")
        if not isinstance(content, str):
            raise DataError(f'{where}: message {i} has no text "content": expected role and content')
        if not content.isascii() and any("\ud800" <= character <= "\udfff" for character in content):
            raise DataError(
                f"{where}: message {i} holds half of a surrogate pair, which is no text: fix the row"
            )
    return messages


def read_conversations(path: str | Path) -> list[tuple[str, dict[str, Any]]]:
    """The rows of a JSONL file with their `file:line`, each checked to be a conversation.

    Raises:
        DataError: a row that is none, by line; or no row at all.
    """
    rows = [(f"{path}:{number + 1}", row) for number, row in read_jsonl(path)]
    for where, row in rows:
        _messages_of(row, where)
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


@dataclass(frozen=True)
class _Turn:
    """Where an assistant's turn stands in the rendered text, in characters."""

    start: int  # where generation starts
    content_end: int
    end: int  # behind what the template adds to the turn


def _assistant_turns(tokenizer: Any, messages: list[dict[str, Any]], text: str, where: str) -> list[_Turn]:
    """Find every assistant turn by rendering the conversation's prefixes, and verify each."""
    turns = []
    for i, message in enumerate(messages):
        content = message["content"].strip()
        if message["role"] != "assistant" or not (i or content):
            continue
        # A conversation that the assistant opens has no prompt before it: its content is where it starts.
        before = render(tokenizer, messages[:i], where, prompt=True, tokenize=False) if i else ""
        through = render(tokenizer, messages[: i + 1], where, tokenize=False)
        at = text.find(content, len(before))
        # What the template puts behind the content: the end of turn, mostly.
        tail = through[through.rfind(content) + len(content) if content else len(before) :].rstrip()
        stop = at + len(content)
        if content not in through[len(before) :] or at < 0:
            raise DataError(f"{where}: the chat template drops or rewrites the content of message {i}")
        if not text.startswith(before) or not text.startswith(tail, stop):
            raise DataError(
                f"{where}: the chat template renders message {i} differently once more messages follow, "
                "so its tokens can't be told from the text; use a template with {% generation %} marks"
            )
        turns.append(_Turn(start=len(before) if i else at, content_end=stop, end=stop + len(tail)))
    return turns


def _mask_turns(
    turns: list[_Turn], ids: list[int], offsets: list[tuple[int, int]], special: set[int]
) -> np.ndarray:
    """Supervise each turn from its first token through its end-of-turn token, if it has one.

    What a template adds behind that token (a line feed, mostly) is the template's, not the model's.
    """
    starts, stops = np.array(offsets).reshape(-1, 2).T
    mask = np.zeros(len(ids), dtype=np.uint8)
    is_special = np.isin(ids, list(special))
    for turn in turns:
        first = int(np.argmax(stops > turn.start))  # the first that reaches into the turn
        inside = np.flatnonzero((starts < turn.content_end) & (stops > turn.start))
        ends = np.flatnonzero(is_special & (starts >= turn.content_end) & (stops <= turn.end))
        if not len(ends) and not len(inside):
            continue  # an empty answer without an end-of-turn token
        last = ends[0] if len(ends) else inside[-1]
        mask[first : last + 1] = 1
    return mask


def tokenize_conversation(
    tokenizer: Any, messages: list[dict[str, Any]], where: str
) -> tuple[np.ndarray, np.ndarray]:
    """Render and tokenise one conversation: `(input_ids [S] int32, loss_mask [S] uint8)`.

    The mask comes from the template's generation marks when it has them, else from the rendered
    prefixes of the conversation.

    Raises:
        DataError: the template refuses the conversation or rewrites its earlier turns.
    """
    template = tokenizer.chat_template
    if not template:
        raise DataError("the target's tokenizer has no chat template: use a chat model as the target")
    if isinstance(template, str) and _GENERATION_MARK.search(template):
        options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
        encoded = render(tokenizer, messages, where, **options)
        return np.array(encoded["input_ids"], np.int32), np.array(encoded["assistant_masks"], np.uint8)
    text = render(tokenizer, messages, where, tokenize=False)
    turns = _assistant_turns(tokenizer, messages, text, where)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= set(tokenizer.all_special_ids)
    mask = _mask_turns(turns, encoded["input_ids"], encoded["offset_mapping"], special)
    return np.array(encoded["input_ids"], dtype=np.int32), mask


def load_conversations(path: str | Path, tokenizer: Any, max_length: int) -> TokenizedData:
    """Read, render and tokenise a JSONL file of conversations.

    Samples are cut at `max_length` tokens and after their last supervised token. A row that then has
    no two supervised tokens in a row offers no anchor; it is dropped and counted.

    Raises:
        DataError: a row that can't be used as a conversation, by file and line; or no usable row.
    """
    data = TokenizedData()
    for number, row in tqdm(read_jsonl(path), unit="row", desc="tokenise", mininterval=1.0):
        data.rows["read"] += 1
        where = f"{path}:{number + 1}"
        ids, mask = tokenize_conversation(tokenizer, _messages_of(row, where), where)
        ids, mask = ids[:max_length], mask[:max_length]
        if count_candidates(mask) == 0:
            data.rows["dropped: no two supervised tokens in a row"] += 1
            continue
        end = int(np.flatnonzero(mask)[-1]) + 1
        data.samples.append(TokenizedSample(number, ids[:end], mask[:end]))
    data.rows["captured"] = len(data.samples)
    if not data.samples:
        raise DataError(f"{path}: no row has an assistant turn to learn from ({data.rows['read']} rows read)")
    return data
