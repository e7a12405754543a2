"""Read a row in any of the common forms: a conversation, a text, or tokens.

To add a form, write a function from a row to one of the three, and put it in `FORMS` with the keys that
identify the form.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pipeline.chat.messages import (
    ROLES,
    BadRowError,
    Conversation,
    Message,
    read_conversation,
    read_list,
    read_text,
    read_tools,
    read_turns,
    refuse_media,
    without_nulls,
)

__all__ = ["FORMS", "BadRowError", "Content", "Conversation", "Message", "Text", "Tokens", "read_row"]


@dataclass(frozen=True)
class Text:
    """Plain text, all of it supervised."""

    text: str


@dataclass(frozen=True)
class Tokens:
    """Token ids with their loss mask."""

    input_ids: list[int] = field(repr=False)
    loss_mask: list[int] = field(repr=False)


Content = Conversation | Text | Tokens

# Label of positions without a loss, as in PyTorch's cross entropy.
IGNORED = -100
# Keys of a system prompt beside the messages.
_SYSTEM = ("system", "system_prompt")


def parse_line(line: bytes) -> dict[str, Any]:
    """Parse a line of JSONL to a row. Raises BadRowError if it is not a JSON object."""
    try:
        row = json.loads(line, object_pairs_hook=distinct)
    except (ValueError, RecursionError) as error:
        raise BadRowError("not JSON", f"not JSON ({error})") from None
    if not isinstance(row, dict):
        raise BadRowError("not a JSON object", f"expected a JSON object, got {type(row).__name__}")
    return row


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object. Raises ValueError if it has a key twice, as one of the values would be lost."""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"an object has the key {twice[:40]!r} twice")
    return found


def _conversation(row: dict[str, Any], items: list[Any]) -> Conversation:
    """Read messages, after the system prompt that the row has beside them, if there is one."""
    found = read_conversation(items, read_tools(row))
    key = next((key for key in _SYSTEM if row.get(key)), None)
    if key is None:
        return found
    first: Message = {"role": "system", "content": read_text(row[key], f'"{key}"')}
    if not found.messages or found.messages[0]["role"] != "system":
        masked = frozenset(number + 1 for number in found.masked)
        return Conversation([first, *found.messages], found.tools, masked)
    if found.messages[0]["content"] == first["content"]:
        return found
    raise BadRowError(
        "two system prompts",
        f'"{key}" and the first message are two different system prompts: keep one of them',
    )


def from_messages(row: dict[str, Any]) -> Conversation:
    """Read OpenAI's form: `messages`, optionally with `tools`."""
    return _conversation(row, read_turns(row, "messages"))


def from_conversations(row: dict[str, Any]) -> Conversation:
    """Read ShareGPT's form: `conversations` of from/value (or role/content), `system` and `tools`."""
    turns = read_turns(row, "conversations" if "conversations" in row else "conversation")
    masked_role = row.get("mask", "user")  # NeMo's form names the role without a loss
    if not isinstance(masked_role, str) or ROLES.get(masked_role.lower()) != "user":
        raise BadRowError(
            "malformed message", f'"mask" {str(masked_role)[:40]!r}: only the user\'s turns can be masked so'
        )
    return _conversation(row, turns)


def _turns(value: Any, role: str, what: str) -> list[Any]:
    """Return a list of messages as it is, and a text as the one message of `role`."""
    found = read_list(value)
    if isinstance(value, str) and isinstance(found, list):  # a text may be any other list in JSON
        named = [isinstance(each, dict) and ("role" in each or "from" in each) for each in found]
        value = found if named and all(named) else value
    if isinstance(value, list) and not any(isinstance(part, dict) and "type" in part for part in value):
        return value
    return [{"role": role, "content": read_text(value, what)}]


def from_prompt(row: dict[str, Any]) -> Conversation:
    """Read `prompt` with `response` or `completion`: each a text, or a list of messages (TRL's form)."""
    if str(row.get("label")).lower() in ("false", "0"):  # TRL's unpaired preferences
        raise BadRowError("a rejected answer", '"label" is false: this answer is a bad example, take it out')
    prompt = _turns(row.get("prompt"), "user", "the prompt")
    answer = _turns(row.get("response", row.get("completion")), "assistant", "the response")
    return _conversation(row, [*prompt, *answer])


def from_alpaca(row: dict[str, Any]) -> Conversation:
    """Read Alpaca's form: `instruction`, `input` and `output`; also Dolly's `context` and `response`."""
    turns: list[Message] = []
    history = read_list(row.get("history")) or []  # LLaMA-Factory's earlier turns
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRowError("malformed message", 'expected "history" to be a list of [question, answer]')
        turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    question = read_text(row.get("instruction"), "the instruction")
    given = read_text(row.get("input") or row.get("context") or "", "the input")
    question = "\n\n".join(part for part in (question, given) if part.strip())
    turns += _turns(question, "user", "the instruction")
    turns += _turns(row.get("output", row.get("response")), "assistant", "the output")
    return _conversation(row, turns)


def from_preference(row: dict[str, Any]) -> Conversation:
    """Read the better answer of a preference pair: `chosen`, a text or messages, and mostly `prompt`."""
    chosen = _turns(row.get("chosen"), "assistant", '"chosen"')
    first = chosen[0] if chosen and isinstance(chosen[0], dict) else {}
    whole = ROLES.get(str(first.get("role", first.get("from"))).lower()) != "assistant"
    prompt = [] if whole else _turns(row.get("prompt"), "user", "the prompt of a preference pair")
    return _conversation(row, [*prompt, *chosen])


def from_text(row: dict[str, Any]) -> Text:
    """Read plain `text`."""
    return Text(read_text(row.get("text"), 'the "text" of this row'))


def from_tokens(row: dict[str, Any]) -> Tokens:
    """Read tokens: `input_ids` with `loss_mask`, or with `labels`, -100 where there is no loss.

    Padding that `attention_mask` names at either end is cut off.
    """
    ids, labels = row.get("input_ids"), row.get("labels")
    mask = row.get("loss_mask")
    name = "labels" if mask is None else "loss_mask"
    if mask is None and isinstance(labels, list):
        mask = [int(label != IGNORED) for label in labels]
    if not isinstance(ids, list) or not isinstance(mask, list):
        raise BadRowError("malformed tokens", f'expected lists "input_ids" and "{name}"')
    if len(ids) != len(mask):
        raise BadRowError(
            "malformed tokens",
            f"expected input_ids and {name} of equal length, got {len(ids)} and {len(mask)}",
        )
    if not all(type(i) is int for i in ids) or not all(m in (0, 1) for m in mask):
        raise BadRowError("malformed tokens", f"expected integers in input_ids, and 0 or 1 in {name}")
    if name == "labels" and any(m and i != label for m, i, label in zip(mask, ids, labels, strict=True)):
        raise BadRowError(
            "malformed tokens",
            "expected labels to be -100 or equal to input_ids, not shifted: each label names its own token",
        )
    if name == "loss_mask" and isinstance(labels, list) and [int(n != IGNORED) for n in labels] != mask:
        raise BadRowError("malformed tokens", "labels and loss_mask contradict each other: drop one of them")
    start, end = _attended(row, len(ids))
    return Tokens(ids[start:end], [int(m) for m in mask[start:end]])


def _attended(row: dict[str, Any], length: int) -> tuple[int, int]:
    """Return first and end of the tokens that are no padding."""
    attention, positions = row.get("attention_mask"), row.get("position_ids")
    if positions is not None and positions != list(range(length)):
        raise BadRowError("malformed tokens", "position_ids do not count from 0: expected one row, unpacked")
    if attention is None:
        return 0, length
    if not isinstance(attention, list) or len(attention) != length or any(a not in (0, 1) for a in attention):
        raise BadRowError("malformed tokens", f"expected an attention_mask of {length} zeros and ones")
    start = attention.index(1) if 1 in attention else length
    end = start + sum(attention)
    if sum(attention[start:end]) != end - start:
        raise BadRowError(
            "malformed tokens", "attention_mask has zeros between tokens: expected padding at an end only"
        )
    return start, end


# name: (groups of keys, function that reads the row). A row has a form if it has a key of each group; the
# first form in this order is taken.
FORMS: dict[str, tuple[tuple[tuple[str, ...], ...], Callable[[dict[str, Any]], Content]]] = {
    "messages": ((("messages",),), from_messages),
    "conversations": ((("conversations", "conversation"),), from_conversations),
    "prompt": ((("prompt",), ("response", "completion")), from_prompt),
    "alpaca": ((("instruction",), ("output", "response")), from_alpaca),
    "tokens": ((("input_ids",), ("loss_mask", "labels")), from_tokens),
    "text": ((("text",),), from_text),
    "preference": ((("chosen",),), from_preference),
}
# Taken only if asked for: a pair can also be meant for another kind of training.
ON_REQUEST = ("preference",)


def form_keys(form: str) -> set[str]:
    """Return the keys that hold the content of a row of this form."""
    beside = {"alpaca": {"input", "context", "history"}, "preference": {"prompt", "rejected"}}
    keys = {key for group in FORMS[form][0] for key in group}
    return keys | beside.get(form, set()) | {*_SYSTEM, "mask"}


def has_form(row: dict[str, Any], form: str) -> bool:
    """Return whether a row has a key of each group of a form."""
    return all(any(key in row for key in group) for group in FORMS[form][0])


def needed_keys(form: str) -> str:
    """Return the keys that a row of a form has, in words."""
    return " and ".join(" or ".join(f'"{key}"' for key in group) for group in FORMS[form][0])


def _keys(row: dict[str, Any]) -> str:
    return ", ".join(map(str, row))[:200] or "none"


def _expected(row: dict[str, Any]) -> str:
    forms = "; ".join(needed_keys(form) for form in FORMS if form not in ON_REQUEST)
    asked = next((f" ({needed_keys(f)} needs --format {f})" for f in ON_REQUEST if has_form(row, f)), "")
    return f"expected a row with one of: {forms}; got keys: {_keys(row)}{asked}"


def detect_form(row: dict[str, Any]) -> str | None:
    """Return the first form whose keys the row has (null counts as absent); None if there is none."""
    present = {key: value for key, value in row.items() if value is not None}
    return next((form for form in FORMS if form not in ON_REQUEST and has_form(present, form)), None)


def read_row(row: dict[str, Any], form: str | None = None) -> Content:
    """Return a row's content.

    Args:
        form: a name in `FORMS`; None detects it from the row's keys.

    Raises:
        BadRowError: the row has no known form or another form, or is malformed.
    """
    try:
        return _read(without_nulls(row), form)
    except RecursionError:
        raise BadRowError("nested too deeply", "lists or objects are nested too deeply to be read") from None


def _read(row: dict[str, Any], form: str | None) -> Content:
    found = form or detect_form(row)
    if found is None:
        raise BadRowError("no known form", _expected(row))
    if not has_form(row, found):
        raise BadRowError(
            "another form",
            f"expected {needed_keys(found)}: the form {found} is that of the source's first row or of "
            f"--format; got keys: {_keys(row)}",
        )
    content = FORMS[found][1](row)
    if isinstance(content, Conversation):
        refuse_media(row, "the row")
    return content
