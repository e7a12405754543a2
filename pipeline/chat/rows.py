"""Read a row in any of the common forms: a conversation, a text, or tokens.

To add a form, write a function from a row to one of the three, and put it in `FORMS` with the keys that
identify the form.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]


class BadRowError(Exception):
    """A row that can't be used. `kind` names the count that it adds to; `str()` is the full message."""

    def __init__(self, kind: str, message: str):
        super().__init__(message.encode("utf-8", "backslashreplace").decode())  # keys may hold surrogates
        self.kind = kind


@dataclass(frozen=True)
class Conversation:
    """Messages for a chat template."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None


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

# Names of roles in ShareGPT-style data.
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}


def parse_line(line: bytes) -> dict[str, Any]:
    """Parse a line of JSONL to a row. Raises BadRowError if it is not a JSON object."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadRowError("not JSON", f"not JSON ({error})") from None
    if not isinstance(row, dict):
        raise BadRowError("not a JSON object", f"expected a JSON object, got {type(row).__name__}")
    return row


def _text(value: Any, what: str) -> str:
    """Return a value as valid text. Content in parts is joined if all of them are text."""
    if (
        isinstance(value, list)
        and value
        and all(isinstance(p, dict) and p.get("type") == "text" for p in value)
    ):
        value = "".join(_text(part.get("text"), what) for part in value)
    if not isinstance(value, str):
        raise BadRowError(
            "malformed message", f"{what} is not text: expected a string, got {type(value).__name__}"
        )
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise BadRowError("not text", f"{what} has half of a surrogate pair, which is not text: fix the row")
    return value


def _tools(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    tools = row.get("tools") or None
    if isinstance(tools, str):  # columnar data often stores schemas as JSON text
        try:
            tools = json.loads(tools) or None
        except (ValueError, RecursionError) as error:
            raise BadRowError("malformed tools", f'"tools" is text but not JSON ({error})') from None
    if tools is not None and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise BadRowError("malformed tools", 'expected "tools" to be a list of JSON schemas')
    return tools


def _tool_call(call: Any, what: str) -> dict[str, Any]:
    """Return an OpenAI tool call with its arguments as an object, as chat templates expect them."""
    if not isinstance(call, dict):
        raise BadRowError("malformed message", f"{what}: expected each tool call to be an object")
    function = call.get("function")
    inner = dict(function) if isinstance(function, dict) else dict(call)
    if isinstance(inner.get("arguments"), str):
        # Invalid JSON is the model's own error and stays text.
        with contextlib.suppress(ValueError, RecursionError):
            inner["arguments"] = json.loads(inner["arguments"])
    return {**call, "function": inner} if isinstance(function, dict) else inner


def _message(message: Any, number: int) -> Message:
    what = f"message {number}"
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise BadRowError("malformed message", f'{what} has no "role": expected role and content')
    clean = {key: value for key, value in message.items() if value is not None}
    if clean.get("tool_calls"):
        if not isinstance(clean["tool_calls"], list):
            raise BadRowError("malformed message", f'{what}: expected "tool_calls" to be a list')
        clean["tool_calls"] = [_tool_call(call, what) for call in clean["tool_calls"]]
        clean.setdefault("content", "")
    else:
        clean.pop("tool_calls", None)
    if "content" not in clean:
        raise BadRowError("malformed message", f'{what} has no text "content": expected role and content')
    clean["content"] = _text(clean["content"], what)
    if isinstance(clean.get("reasoning_content"), str):
        _text(clean["reasoning_content"], what)
    return clean


def from_messages(row: dict[str, Any]) -> Conversation:
    """Read OpenAI's form: `messages`, optionally with `tools`."""
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRowError("no messages", _expected(row))
    return Conversation([_message(m, i) for i, m in enumerate(messages)], _tools(row))


def from_conversations(row: dict[str, Any]) -> Conversation:
    """Read ShareGPT's form: `conversations` of from/value (or role/content), `system` and `tools`."""
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise BadRowError("no messages", _expected(row))
    messages: list[Message] = []
    if isinstance(row.get("system"), str) and row["system"]:
        messages.append({"role": "system", "content": _text(row["system"], "the system prompt")})
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise BadRowError(
                "malformed message", f"message {number} is not an object: expected from and value"
            )
        if "from" not in turn:
            messages.append(_message(turn, number))
            continue
        role = _ROLES.get(str(turn["from"]).lower())
        if role is None:
            known = ", ".join(_ROLES)
            raise BadRowError(
                "unknown role",
                f"message {number} is from {str(turn['from'])[:40]!r}, expected one of {known}",
            )
        messages.append({"role": role, "content": _text(turn.get("value"), f"message {number}")})
    return Conversation(messages, _tools(row))


def from_prompt(row: dict[str, Any]) -> Conversation:
    """Read `prompt` with `response` or `completion`: each a text, or a list of messages (TRL's form)."""
    answer = row.get("response", row.get("completion"))

    def turns(value: Any, role: str, what: str) -> list[Message]:
        if isinstance(value, list) and not any(isinstance(p, dict) and "type" in p for p in value):
            return [_message(m, i) for i, m in enumerate(value)]
        return [{"role": role, "content": _text(value, what)}]

    prompt = turns(row.get("prompt"), "user", "the prompt")
    if isinstance(row.get("system"), str) and row["system"]:
        prompt.insert(0, {"role": "system", "content": _text(row["system"], "the system prompt")})
    return Conversation([*prompt, *turns(answer, "assistant", "the response")], _tools(row))


def from_text(row: dict[str, Any]) -> Text:
    """Read plain `text`."""
    return Text(_text(row.get("text"), 'the "text" of this row'))


def from_tokens(row: dict[str, Any]) -> Tokens:
    """Read tokens: `input_ids` and `loss_mask`, of equal length."""
    ids, mask = row.get("input_ids"), row.get("loss_mask")
    if not isinstance(ids, list) or not isinstance(mask, list):
        raise BadRowError("malformed tokens", 'expected lists "input_ids" and "loss_mask"')
    if len(ids) != len(mask):
        raise BadRowError(
            "malformed tokens",
            f"expected input_ids and loss_mask of equal length, got {len(ids)} and {len(mask)}",
        )
    if not all(type(i) is int for i in ids) or not all(m in (0, 1) for m in mask):
        raise BadRowError("malformed tokens", "expected integers in input_ids, and 0 or 1 in loss_mask")
    return Tokens(ids, [int(m) for m in mask])


# name: (groups of keys, function that reads the row). A row has a form if it has a key of each group; the
# first form in this order is taken.
FORMS: dict[str, tuple[tuple[tuple[str, ...], ...], Callable[[dict[str, Any]], Content]]] = {
    "messages": ((("messages",),), from_messages),
    "conversations": ((("conversations",),), from_conversations),
    "prompt": ((("prompt",), ("response", "completion")), from_prompt),
    "tokens": ((("input_ids",), ("loss_mask",)), from_tokens),
    "text": ((("text",),), from_text),
}


# Keys that hold the content of a row, in any form.
FORM_KEYS = {"system", *(key for groups, _ in FORMS.values() for group in groups for key in group)}


def _has(row: dict[str, Any], form: str) -> bool:
    return all(any(key in row for key in group) for group in FORMS[form][0])


def _expected(row: dict[str, Any]) -> str:
    keys = ", ".join(map(str, row))[:200] or "none"
    return (
        'expected a row with "messages": [{"role": ..., "content": ...}] (or conversations, prompt and '
        f"response, text, input_ids and loss_mask), got keys: {keys}"
    )


def detect_form(row: dict[str, Any]) -> str | None:
    """Return the first form whose keys the row has (null counts as absent); None if there is none."""
    present = {key: value for key, value in row.items() if value is not None}
    return next((form for form in FORMS if _has(present, form)), None)


def read_row(row: dict[str, Any], form: str | None = None) -> Content:
    """Return a row's content.

    Args:
        form: a name in `FORMS`; None detects it from the row's keys.

    Raises:
        BadRowError: the row has no known form or another form, or is malformed.
    """
    row = {key: value for key, value in row.items() if value is not None}  # null counts as absent
    found = form or detect_form(row)
    if found is None:
        raise BadRowError("no known form", _expected(row))
    if not _has(row, found):
        needed = " and ".join(" or ".join(f'"{key}"' for key in group) for group in FORMS[found][0])
        keys = ", ".join(map(str, row))[:200] or "none"
        raise BadRowError("another form", f"expected a row with {needed}, like the others, got keys: {keys}")
    return FORMS[found][1](row)
