"""What a row says, in every form, and what is wrong with it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from pipeline.chat.rows import BadRowError, Conversation, Text, Tokens, detect_form, parse_line, read_row

USER, ANSWER = {"role": "user", "content": "why"}, {"role": "assistant", "content": "yes"}
SYSTEM = {"role": "system", "content": "short"}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def call(arguments: Any) -> dict[str, Any]:
    return {**CALL, "function": {"name": "add", "arguments": arguments}}


ROWS: dict[str, tuple[dict[str, Any], str, Any]] = {
    "messages": ({"messages": [USER, ANSWER]}, "messages", Conversation([USER, ANSWER])),
    "tools": (
        {"messages": [USER, ANSWER], "tools": TOOLS},
        "messages",
        Conversation([USER, ANSWER], TOOLS),
    ),
    "tools as JSON text": (
        {"messages": [USER, ANSWER], "tools": json.dumps(TOOLS)},
        "messages",
        Conversation([USER, ANSWER], TOOLS),
    ),
    "no tools": ({"messages": [USER, ANSWER], "tools": []}, "messages", Conversation([USER, ANSWER])),
    "arguments as JSON text become an object": (
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call('{"a": 1}')]}]},
        "messages",
        Conversation([USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}]),
    ),
    "arguments that are no JSON stay text": (
        {"messages": [USER, {"role": "assistant", "tool_calls": [call("a=1")]}]},
        "messages",
        Conversation([USER, {"role": "assistant", "content": "", "tool_calls": [call("a=1")]}]),
    ),
    "null keys are no keys": (
        {"messages": [{**USER, "tool_calls": None, "name": None}, {**ANSWER, "tool_calls": []}]},
        "messages",
        Conversation([USER, ANSWER]),
    ),
    "content in parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "w"}, {"type": "text", "text": "hy"}]}
            ]
        },
        "messages",
        Conversation([USER]),
    ),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "why"}, {"from": "gpt", "value": "yes"}]},
        "conversations",
        Conversation([USER, ANSWER]),
    ),
    "ShareGPT with a system prompt beside it": (
        {"conversations": [{"from": "Human", "value": "why"}], "system": "short"},
        "conversations",
        Conversation([SYSTEM, USER]),
    ),
    "ShareGPT tools": (
        {"conversations": [{"from": "function_response", "value": "4"}], "tools": "[]"},
        "conversations",
        Conversation([{"role": "tool", "content": "4"}]),
    ),
    "conversations of role and content": (
        {"conversations": [USER, ANSWER]},
        "conversations",
        Conversation([USER, ANSWER]),
    ),
    "prompt and response": ({"prompt": "why", "response": "yes"}, "prompt", Conversation([USER, ANSWER])),
    "prompt and completion": ({"prompt": "why", "completion": "yes"}, "prompt", Conversation([USER, ANSWER])),
    "prompt and completion as messages": (
        {"prompt": [SYSTEM, USER], "completion": [ANSWER]},
        "prompt",
        Conversation([SYSTEM, USER, ANSWER]),
    ),
    "prompt with a system prompt": (
        {"system": "short", "prompt": "why", "response": "yes"},
        "prompt",
        Conversation([SYSTEM, USER, ANSWER]),
    ),
    "text": ({"text": "once upon"}, "text", Text("once upon")),
    "tokens": ({"input_ids": [1, 2], "loss_mask": [0, 1]}, "tokens", Tokens([1, 2], [0, 1])),
    "tokens with a boolean mask": ({"input_ids": [1], "loss_mask": [True]}, "tokens", Tokens([1], [1])),
    "a null key is no key": (
        {"response": None, "prompt": "why", "completion": "yes"},
        "prompt",
        Conversation([USER, ANSWER]),
    ),
    "null messages are none": ({"messages": None, "text": "once"}, "text", Text("once")),
    "arguments that are nested deep stay text": (
        {"messages": [USER, {"role": "assistant", "tool_calls": [call("[" * 10**5)]}]},
        "messages",
        Conversation([USER, {"role": "assistant", "content": "", "tool_calls": [call("[" * 10**5)]}]),
    ),
    "messages go before text": (
        {"text": "rendered", "messages": [USER]},
        "messages",
        Conversation([USER]),
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_every_form_is_recognised_and_read(name):
    row, form, content = ROWS[name]
    before = json.dumps(row)
    assert detect_form(row) == form
    assert read_row(row) == read_row(row, form) == content
    assert json.dumps(row) == before, "a row is left as it was"


BAD: dict[str, tuple[Any, str | None, str, str]] = {
    "no form": ({"chat": 1}, None, "no known form", "got keys: chat"),
    "no keys": ({}, None, "no known form", "got keys: none"),
    "another form": (
        {"text": "x"},
        "messages",
        "another form",
        '"messages" as in the other rows of this source (form messages), got keys: text',
    ),
    "half a form": ({"prompt": "x"}, "prompt", "another form", '"response" or "completion"'),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        None,
        "not text",
        "message 0 has a part of type 'image_url'",
    ),
    "a role nobody knows": (
        {"conversations": [{"from": "narrator", "value": "x"}]},
        None,
        "unknown role",
        "'narrator'",
    ),
    "a turn that is text": ({"conversations": ["x"]}, None, "malformed message", "message 0"),
    "no turns": ({"conversations": []}, None, "no messages", "conversations"),
    "tool calls that are text": (
        {"messages": [{"role": "assistant", "content": "", "tool_calls": "add"}]},
        None,
        "malformed message",
        "message 0",
    ),
    "a tool call that is text": (
        {"messages": [{"role": "assistant", "content": "", "tool_calls": ["add"]}]},
        None,
        "malformed message",
        "message 0",
    ),
    "tools that are nested deep": (
        {"messages": [USER], "tools": "[" * 10**5},
        None,
        "malformed tools",
        "not",
    ),
    "a key that is no text": ({"\ud800": 1}, None, "no known form", "\\ud800"),
    "tools that are no JSON": ({"messages": [USER], "tools": "[{"}, None, "malformed tools", "not JSON"),
    "tools that are an object": ({"messages": [USER], "tools": {"a": 1}}, None, "malformed tools", "list"),
    "a response that is a number": (
        {"prompt": "x", "response": 3},
        None,
        "malformed message",
        "the response",
    ),
    "text that is a list": ({"text": ["x"]}, None, "malformed message", '"text" of this row is not text'),
    "half a pair": ({"text": "\ud83d"}, None, "not text", "surrogate"),
    "ids of another length": (
        {"input_ids": [1], "loss_mask": []},
        None,
        "malformed tokens",
        "input_ids and loss_mask of equal length, got 1 and 0",
    ),
    "ids that are text": (
        {"input_ids": ["1"], "loss_mask": [1]},
        None,
        "malformed tokens",
        "integers in input_ids",
    ),
    "a mask of twos": ({"input_ids": [1], "loss_mask": [2]}, None, "malformed tokens", "0 or 1"),
    "a mask that is text": ({"input_ids": [1], "loss_mask": "1"}, None, "malformed tokens", "lists"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_with_a_row_is_counted_under_a_name_and_told_in_one_line(name):
    row, form, kind, words = BAD[name]
    with pytest.raises(BadRowError) as caught:
        read_row(row, form)
    assert caught.value.kind == kind
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("line", [b"{", b"\xff", b"[1]", b"3", b'"messages"', b"null"])
def test_a_line_that_is_no_object_is_a_bad_row(line):
    with pytest.raises(BadRowError):
        parse_line(line)
