"""Read the messages of a conversation, in any of the common spellings, as chat templates expect them.

To add a spelling of a role, a mask or a part, add it to the tables.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
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
    masked: frozenset[int] = frozenset()
    """Numbers of the assistant's messages that the row itself leaves out of the loss."""


ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "ai": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    # Roles that published chat templates know by these names.
    "developer": "developer",
    "document": "document",
    "context": "context",
    "control": "control",
}
# Roles of assistant turns whose text is a tool call in JSON (LLaMA-Factory's and ms-swift's forms).
_CALLING_ROLES = ("function_call", "tool_call")
# Keys by which a message leaves itself out of the loss, and the value that does so: OpenAI's fine-tuning form
# has `weight`, axolotl `train` and `training`, ms-swift `loss`; `loss_mask` is 1 where the loss is, as in
# rows of tokens.
_MASKS: dict[str, bool] = {
    "weight": False,
    "train": False,
    "training": False,
    "loss": False,
    "loss_mask": False,
    "mask": True,
}
_TEXT_PARTS = ("text", "input_text", "output_text")
# Keys that hold what is not text, beside the text of a row or a message.
_MEDIA = ("image", "images", "audio", "audios", "video", "videos")


def without_nulls(value: Any) -> Any:
    """Return a row without keys whose value is null, at any depth.

    Columnar files give every message every key: one without tool calls has `tool_calls: null`, which some
    chat templates render as tool calls. So that equal data gives equal tokens, all sources are read alike.
    """
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        if value and all(isinstance(item, tuple) for item in value):  # a map, as Arrow gives it
            return without_nulls(dict(value))
        return [without_nulls(item) for item in value]
    return value


def refuse_media(item: dict[str, Any], what: str) -> None:
    """Refuse images, sounds and films beside the text. Raises BadRowError."""
    found = [key for key in _MEDIA if item.get(key)]
    if found:
        raise BadRowError(
            "not text",
            f"{what} has {', '.join(map(repr, found))}, but only text is captured: take the row out, "
            "or give --bad-rows skip",
        )


def read_text(value: Any, what: str) -> str:
    """Return a value as valid text. Content in parts is joined if all of them are text."""
    if isinstance(value, list):
        for part in value:
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind not in _TEXT_PARTS:
                raise BadRowError(
                    "not text",
                    f"{what} has a part of type {kind[:40]!r}, but only text is captured: take the row out, "
                    "or give --bad-rows skip",
                )
        if all(isinstance(part, dict) and "type" in part for part in value):
            value = "".join(read_text(part.get("text"), what) for part in value)
    if not isinstance(value, str):
        raise BadRowError(
            "malformed message", f"{what} is not text: expected a string, got {type(value).__name__}"
        )
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise BadRowError("not text", f"{what} has half of a surrogate pair, which is not text: fix the row")
    return value


def read_turns(row: dict[str, Any], key: str) -> list[Any]:
    """Return the messages under a key of a row. Raises BadRowError if there are none."""
    turns = read_list(row.get(key))
    if isinstance(turns, list) and turns:
        return turns
    got = "an empty list" if turns == [] else type(turns).__name__
    if isinstance(turns, str):
        got = "text that is no list in JSON"
    raise BadRowError("no messages", f'expected "{key}" to be a list of messages, got {got}')


def read_list(value: Any) -> Any:
    """Return a list that columnar data keeps as JSON text; any other value unchanged."""
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        with contextlib.suppress(ValueError, RecursionError):
            return without_nulls(json.loads(value))
    return value


def read_tools(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Return the row's `tools`; None without any. Columnar data often stores them as JSON text."""
    older = not row.get("tools")
    key = "functions" if older else "tools"  # `functions` is OpenAI's older key
    tools = row.get(key) or None
    if isinstance(tools, str):
        try:
            tools = without_nulls(json.loads(tools)) or None
        except (ValueError, RecursionError) as error:
            raise BadRowError("malformed tools", f'"{key}" is text but not JSON ({error})') from None
    if tools is None:
        return None
    if not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise BadRowError("malformed tools", f'expected "{key}" to be a list of JSON schemas')
    return [{"type": "function", "function": function} for function in tools] if older else tools


def read_conversation(items: Iterable[Any], tools: list[dict[str, Any]] | None = None) -> Conversation:
    """Read messages of role/content or ShareGPT's turns of from/value, in their order.

    Raises:
        BadRowError: one of them is malformed, has an unknown role, or is not text.
    """
    messages, masked = [], set()
    for number, item in enumerate(items):
        what = f"message {number}"
        if not isinstance(item, dict):
            raise BadRowError("malformed message", f"{what} is not an object: expected role and content")
        message = _message({key: value for key, value in item.items() if key not in _MASKS}, what)
        messages.append(message)
        if message["role"] != "assistant":  # nothing else is learned from, whatever its keys say
            continue
        left_out = [_masks(key, item[key], what) for key in _of(item)]
        if not any(left_out):
            continue
        if not all(left_out):
            raise BadRowError(
                "malformed message", f"{what}: its keys {', '.join(_of(item))} contradict each other"
            )
        masked.add(number)
    return Conversation(messages, tools, frozenset(masked))


def _of(item: dict[str, Any]) -> list[str]:
    return [key for key in _MASKS if key in item]


def _masks(key: str, value: Any, what: str) -> bool:
    """Return whether a message's own key leaves it out of the loss."""
    if key == "mask" and type(value) is not bool:
        raise BadRowError(
            "malformed message",
            f'{what}: "mask" can mean masked or learned from: expected true (masked) or false, or "weight" 0',
        )
    if not isinstance(value, (bool, int, float)) or value not in (0, 1):
        raise BadRowError(
            "malformed message",
            f'{what}: expected "{key}" to be 0, 1, true or false, got {value!r:.40}: only whole messages '
            "are learned from or left out",
        )
    return bool(value) is _MASKS[key]


def _message(item: dict[str, Any], what: str) -> Message:
    """Return a message with a known role and its content as text."""
    said = item.pop("from", None)
    if said is not None:
        item = {"role": said, **{key: value for key, value in item.items() if key != "role"}}
        if "value" in item:
            item["content"] = item.pop("value")
    if not isinstance(item.get("role"), str):
        raise BadRowError("malformed message", f'{what} has no "role": expected role and content')
    name = item["role"].strip().lower()
    if name in _CALLING_ROLES:
        item |= {"tool_calls": _calls_of_text(item.get("content"), what), "content": ""}
        name = "assistant"
    if name not in ROLES:
        known = ", ".join([*ROLES, *_CALLING_ROLES])
        raise BadRowError(
            "unknown role", f"{what} has the role {item['role'][:40]!r}, expected one of {known}"
        )
    item["role"] = ROLES[name]
    refuse_media(item, what)
    _read_calls(item, what)
    if "content" not in item and (item["role"] == "tool" or _thinks(item) or "tool_calls" in item):
        item["content"] = ""
    if "content" not in item:
        raise BadRowError("malformed message", f'{what} has no text "content": expected role and content')
    item["content"] = read_text(item["content"], what)
    if isinstance(item.get("reasoning_content"), str):
        read_text(item["reasoning_content"], what)
    return item


def _thinks(item: dict[str, Any]) -> bool:
    return item["role"] == "assistant" and any(item.get(key) for key in ("reasoning_content", "reasoning"))


def _read_calls(item: dict[str, Any], what: str) -> None:
    """Give a message's tool calls the form that templates expect, OpenAI's older `function_call` too."""
    calls = read_list(item.pop("tool_calls", None))
    older = item.pop("function_call", None)
    if older is not None and older != {}:  # columnar files leave an empty object where there is no call
        if calls:
            raise BadRowError("malformed message", f"{what} has both tool_calls and function_call")
        older = parsed_json(older)
        if not isinstance(older, dict) or not isinstance(older.get("name"), str):
            raise BadRowError("malformed message", f'{what}: expected "function_call" with a name')
        calls = [{"type": "function", "function": older}]
    if not calls:
        return
    if not isinstance(calls, list):
        raise BadRowError("malformed message", f'{what}: expected "tool_calls" to be a list')
    item["tool_calls"] = [_tool_call(call, what) for call in calls]


def _tool_call(call: Any, what: str) -> dict[str, Any]:
    """Return an OpenAI tool call with its arguments as an object, as chat templates expect them."""
    call = parsed_json(call)
    if not isinstance(call, dict):
        raise BadRowError("malformed message", f"{what}: expected each tool call to be an object")
    if "function" not in call:  # name and arguments without the object around them
        about = {key: value for key, value in call.items() if key not in ("id", "type")}
        call = {"type": "function", **{key: call[key] for key in call if key not in about}, "function": about}
    function = parsed_json(call["function"])
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRowError("malformed message", f"{what}: expected each tool call to name its function")
    if isinstance(function.get("arguments"), str):
        function = {**function, "arguments": parsed_json(function["arguments"])}
    return {**call, "function": function}


def _calls_of_text(value: Any, what: str) -> list[Any]:
    """Return the tool calls of a turn whose text is a call in JSON, or a list of them."""
    found = parsed_json(value) if isinstance(value, str) else value
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, dict) and "name" in call for call in calls):
        raise BadRowError(
            "malformed message", f'{what} is a tool call: expected JSON with "name" and "arguments"'
        )
    return [{"type": "function", "function": call} for call in calls]


def parsed_json(text: Any) -> Any:
    """Return the value of JSON text. Invalid JSON is the model's own error and stays text."""
    if isinstance(text, str):
        with contextlib.suppress(ValueError, RecursionError):
            return json.loads(text)
    return text
