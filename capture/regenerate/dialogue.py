"""A conversation whose assistant turns are being answered by the target."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from pipeline.chat.messages import ROLES, BadRowError, parsed_json, read_tools, without_nulls
from pipeline.errors import DataError
from pipeline.text import one_line

Message = dict[str, Any]

# Fields of a message that replace an assistant's turn: `content`, and `reasoning_content` and `tool_calls` if
# an endpoint returns them separately.
Answer = dict[str, Any]

# Fields of the old answer. Another model's reasoning and calls are removed with its content.
_OF_THE_OLD_ANSWER = ("content", "reasoning_content", "reasoning", "thinking", "refusal", "tool_calls")


@dataclass
class Dialogue:
    """A row, the assistant turns to regenerate, and the answers so far."""

    number: int
    """Number of the row, from 0."""
    where: str
    """The row's place, for errors."""
    row: dict[str, Any]
    answers: list[Answer] = field(default_factory=list)
    """Answers to the first turns, in order."""
    turns: list[int] = field(init=False)
    """Positions in `messages` of the turns to answer.

    Turns that call tools stay unchanged: the tool messages after them answer those calls.
    """

    def __post_init__(self) -> None:
        messages = [_with_role(message) for message in self.row["messages"]]
        if messages != self.row["messages"]:
            self.row = {**self.row, "messages": messages}
        self.turns = [
            i
            for i, message in enumerate(self.row["messages"])
            if message["role"] == "assistant" and not message.get("tool_calls")
        ]

    @property
    def finished(self) -> bool:
        return len(self.answers) == len(self.turns)

    def messages(self) -> list[Message]:
        """Return the messages with the answers so far inserted."""
        messages = [dict(message) for message in self.row["messages"]]
        for position, answer in zip(self.turns, self.answers, strict=False):
            old = {k: v for k, v in messages[position].items() if k in answer or k not in _OF_THE_OLD_ANSWER}
            messages[position] = {**old, **answer}
        return messages

    def prompt(self) -> list[Message]:
        """Return the messages before the next answer, with the answers so far inserted.

        Raises:
            DataError: there are none.
        """
        if self.row["messages"][0]["role"] == "assistant":
            raise DataError("the assistant opens this conversation, so there is nothing to answer")
        before = self.messages()[: self.turns[len(self.answers)]]
        return without_nulls(before)

    def result(self) -> dict[str, Any]:
        """Return the row with the answers so far inserted, otherwise unchanged."""
        return {**self.row, "messages": self.messages()}

    def tools(self) -> list[dict[str, Any]] | None:
        """Return the schemas of the tools that the target may call. Columnar data stores them as JSON text.

        Raises:
            DataError: they are text that is not JSON.
        """
        try:
            return read_tools(without_nulls(self.row))
        except BadRowError as problem:
            raise DataError(str(problem)) from None

    def prompt_ids(self, tokenizer: Any, template_arguments: dict[str, Any]) -> list[int]:
        """Return the next prompt's tokens. Raises DataError if the chat template refuses it."""
        messages = with_arguments(self.prompt(), parsed_json)
        tools = self.tools()
        try:
            encoded = tokenizer.apply_chat_template(
                messages, tools=tools, add_generation_prompt=True, return_dict=True, **template_arguments
            )
        except Exception as error:  # templates raise anything: jinja errors, KeyError, ...
            reason = one_line(error, limit=None)
            raise DataError(f"the chat template refuses this conversation: {reason}") from None
        return list(encoded["input_ids"])


def _with_role(message: Message) -> Message:
    role = ROLES.get(message["role"].strip().lower(), message["role"])
    return message if role == message["role"] else {**message, "role": role}


def with_arguments(messages: list[Message], change: Callable[[Any], Any]) -> list[Message]:
    """Return the messages with `change` applied to the arguments of every tool call.

    Chat templates expect arguments as an object, OpenAI's API as JSON text; data has either.
    """

    def changed(call: Any) -> Any:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or "arguments" not in function:
            return call
        return {**call, "function": {**function, "arguments": change(function["arguments"])}}

    return [
        {**message, "tool_calls": [changed(call) for call in message["tool_calls"]]}
        if message.get("tool_calls")
        else message
        for message in messages
    ]


def to_json(row: dict[str, Any]) -> str:
    """Return a row as one line of JSON. Types that only columnar data has, such as dates, become text."""
    line = json.dumps(row, ensure_ascii=False, default=str)
    try:
        line.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which needs an escape
        return json.dumps(row, default=str)
    return line


def rows_hash(dialogues: Iterable[Dialogue]) -> str:
    """Return the hash of the rows, independent of their file."""
    digest = hashlib.sha256()
    for dialogue in dialogues:
        digest.update(to_json(dialogue.row).encode() + b"\n")
    return digest.hexdigest()
