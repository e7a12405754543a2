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
        if not isinstance(message.get("content"), str):
            raise DataError(f'{where}: message {i} has no text "content": expected role and content')
    return messages


def read_conversations(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSONL file, each checked to be a conversation. Raises DataError by line."""
    for number, row in read_jsonl(path):
        _messages_of(row, f"{path}:{number + 1}")
        yield row


def _render(tokenizer: Any, messages: list[dict[str, Any]], where: str, *, prompt: bool = False) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except Exception as error:  # templates raise what they like: jinja errors, KeyError, ...
        reason = " ".join(str(error).split())
        raise DataError(f"{where}: the chat template refuses this conversation: {reason}") from None


def _assistant_spans(tokenizer: Any, messages: list[dict[str, Any]], text: str, where: str) -> list[range]:
    """Character ranges of the assistant's turns in `text`, from rendered prefixes, verified."""
    spans = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:i], where, prompt=True) if i else ""
        after = _render(tokenizer, messages[: i + 1], where)
        if not text.startswith(before) or not text.startswith(after.rstrip()):
            raise DataError(
                f"{where}: the chat template renders message {i} differently once more messages follow, "
                "so its tokens can't be told from the text; use a template with {% generation %} marks"
            )
        if message["content"].strip() not in text[len(before) : len(after)]:
            raise DataError(f"{where}: the chat template drops or rewrites the content of message {i}")
        spans.append(range(len(before), len(after)))
    return spans


def _mask_from_spans(
    spans: list[range], ids: list[int], offsets: list[tuple[int, int]], special: set[int]
) -> np.ndarray:
    """Supervise the tokens inside each span, up to its end-of-turn token if it has one."""
    starts = np.array([start for start, _ in offsets])
    stops = np.array([stop for _, stop in offsets])
    mask = np.zeros(len(ids), dtype=np.uint8)
    for span in spans:
        inside = np.flatnonzero((starts >= span.start) & (stops <= span.stop) & (stops > starts))
        ends = [position for position in inside if ids[position] in special]
        # What follows the end-of-turn token (a line feed, mostly) is the template's, not the model's.
        mask[inside if not ends else inside[inside <= ends[-1]]] = 1
    return mask


def tokenize_conversation(tokenizer: Any, messages: list[dict[str, Any]], where: str) -> tuple:
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
        encoded = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        return np.array(encoded["input_ids"], np.int32), np.array(encoded["assistant_masks"], np.uint8)
    text = _render(tokenizer, messages, where)
    spans = _assistant_spans(tokenizer, messages, text, where)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    mask = _mask_from_spans(spans, encoded["input_ids"], encoded["offset_mapping"], special)
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
