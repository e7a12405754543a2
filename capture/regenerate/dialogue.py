"""One conversation on its way to the target's own words."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from capture.data.conversations import read_conversations, render
from pipeline.errors import DataError

Message = dict[str, Any]

# The fields of a message that replace an assistant's turn: `content`, and where an endpoint tells them
# apart from it `reasoning_content` and `tool_calls`.
Answer = dict[str, Any]

# What another model thought or called is not the target's: it goes with the answer that it led to.
_OF_THE_OLD_ANSWER = ("content", "reasoning_content", "reasoning", "thinking", "refusal", "tool_calls")


@dataclass
class Dialogue:
    """A row, which of its messages are to be answered anew, and the answers so far."""

    number: int
    """Of the row, from 0."""
    where: str
    """The row's place, for errors."""
    row: dict[str, Any]
    answers: list[Answer] = field(default_factory=list)
    """Of the first turns, in order."""
    turns: list[int] = field(init=False)
    """Positions in `messages` of the turns to answer.

    Turns that call tools stay as they are: the tool messages behind them are answers to those calls.
    """

    def __post_init__(self) -> None:
        self.turns = [
            i
            for i, message in enumerate(self.row["messages"])
            if message["role"] == "assistant" and not message.get("tool_calls")
        ]

    @property
    def finished(self) -> bool:
        return len(self.answers) == len(self.turns)

    def messages(self) -> list[Message]:
        """The messages, with the answers so far in place."""
        messages = [dict(message) for message in self.row["messages"]]
        for position, answer in zip(self.turns, self.answers, strict=False):
            old = {k: v for k, v in messages[position].items() if k in answer or k not in _OF_THE_OLD_ANSWER}
            messages[position] = {**old, **answer}
        return messages

    def prompt(self) -> list[Message]:
        """What the next answer is conditioned on: the messages before it, answers in place.

        Raises:
            DataError: there are none.
        """
        if self.row["messages"][0]["role"] == "assistant":
            raise DataError("the assistant opens this conversation, so there is nothing to answer")
        return self.messages()[: self.turns[len(self.answers)]]

    def result(self) -> dict[str, Any]:
        """The row, with the answers so far in place and everything else as it was."""
        return {**self.row, "messages": self.messages()}

    def tools(self) -> list[dict[str, Any]] | None:
        """The schemas of the tools that the target may call, which columnar data keeps as JSON text."""
        tools = self.row.get("tools") or None
        if isinstance(tools, str):
            try:
                return json.loads(tools) or None
            except ValueError as error:
                raise DataError(f'"tools" is text that is not JSON ({error})') from None
        return tools

    def prompt_ids(self, tokenizer: Any, template_arguments: dict[str, Any]) -> list[int]:
        """The next prompt's tokens. Raises DataError when the chat template refuses it."""
        messages = with_arguments(self.prompt(), _parsed)
        options: dict[str, Any] = {**template_arguments, "tools": self.tools(), "return_dict": True}
        try:
            return list(render(tokenizer, messages, self.where, prompt=True, **options)["input_ids"])
        except DataError as error:
            raise DataError(str(error).removeprefix(f"{self.where}: ")) from None


def with_arguments(messages: list[Message], change: Callable[[Any], Any]) -> list[Message]:
    """The messages, with `change` applied to the arguments of every tool call.

    Chat templates expect them as an object, OpenAI's interface as JSON text; data has either.
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


def _parsed(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments)
    except ValueError:  # a model's own slip is rendered as the text it is
        return arguments


def read_dialogues(data: str) -> list[Dialogue]:
    """The rows of `data` as dialogues without answers. Raises DataError for one that is no conversation."""
    rows = read_conversations(data)
    return [Dialogue(number, where, row) for number, (where, row) in enumerate(rows)]


def to_json(row: dict[str, Any]) -> str:
    """A row as one line; dates and the like, which Parquet has and JSON has not, as text."""
    line = json.dumps(row, ensure_ascii=False, default=str)
    try:
        line.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which only an escape can write
        return json.dumps(row, default=str)
    return line


def rows_hash(dialogues: Iterable[Dialogue]) -> str:
    """Hash of the rows, whatever file they came from."""
    digest = hashlib.sha256()
    for dialogue in dialogues:
        digest.update(to_json(dialogue.row).encode() + b"\n")
    return digest.hexdigest()
