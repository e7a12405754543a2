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
    "aliases of roles, in any case": (
        {"messages": [{"role": "Human", "content": "why"}, {"role": " GPT", "content": "yes"}]},
        "messages",
        Conversation([USER, ANSWER]),
    ),
    "messages as JSON text": (
        {"messages": json.dumps([USER, ANSWER])},
        "messages",
        Conversation([USER, ANSWER]),
    ),
    "one conversation": ({"conversation": [USER, ANSWER]}, "conversations", Conversation([USER, ANSWER])),
    "a system prompt beside messages": (
        {"messages": [USER], "system": "short"},
        "messages",
        Conversation([SYSTEM, USER]),
    ),
    "ShareGPT turns keep their keys": (
        {
            "conversations": [
                {"from": "gpt", "value": None, "tool_calls": [call('{"a": 1}')], "reasoning_content": "mm"}
            ]
        },
        "conversations",
        Conversation([{"role": "assistant", "content": "", "reasoning_content": "mm", "tool_calls": [CALL]}]),
    ),
    "a turn that is a call": (
        {"conversations": [{"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'}]},
        "conversations",
        Conversation(
            [
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{k: v for k, v in CALL.items() if k != "id"}],
                }
            ]
        ),
    ),
    "OpenAI's older call": (
        {
            "messages": [
                {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
                {"role": "function", "name": "f", "content": None},
            ]
        },
        "messages",
        Conversation(
            [
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
                },
                {"role": "tool", "name": "f", "content": ""},
            ]
        ),
    ),
    "OpenAI's older tools": (
        {"messages": [USER], "functions": [TOOLS[0]["function"]]},
        "messages",
        Conversation([USER], TOOLS),
    ),
    "no parts": (
        {"messages": [{"role": "user", "content": []}]},
        "messages",
        Conversation([{**USER, "content": ""}]),
    ),
    "thoughts alone": (
        {"messages": [{"role": "assistant", "content": None, "reasoning_content": "mm"}]},
        "messages",
        Conversation([{"role": "assistant", "content": "", "reasoning_content": "mm"}]),
    ),
    "nested nulls are no keys, and null in a list stays": (
        {"messages": [USER], "tools": [{"function": {"name": "f", "d": None, "enum": ["a", None]}}]},
        "messages",
        Conversation([USER], [{"function": {"name": "f", "enum": ["a", None]}}]),
    ),
    "masks by every key": (
        {
            "messages": [
                USER,
                {**ANSWER, "weight": 0},
                {**ANSWER, "train": False},
                {**ANSWER, "loss_mask": 0},
                {**ANSWER, "mask": True},
                {**ANSWER, "weight": 1.0, "train": True, "loss_mask": 1, "mask": False},
            ]
        },
        "messages",
        Conversation([USER, *[ANSWER] * 5], masked=frozenset({1, 2, 3, 4})),
    ),
    "a mask behind a system prompt": (
        {"system": "short", "conversations": [USER, {**ANSWER, "weight": 0}]},
        "conversations",
        Conversation([SYSTEM, USER, ANSWER], masked=frozenset({2})),
    ),
    "Alpaca": (
        {"instruction": "why", "input": "", "output": "yes"},
        "alpaca",
        Conversation([USER, ANSWER]),
    ),
    "Alpaca with an input": (
        {"instruction": "add", "input": "1 2", "output": "3", "history": [["why", "yes"]]},
        "alpaca",
        Conversation(
            [
                USER,
                ANSWER,
                {"role": "user", "content": "add\n\n1 2"},
                {"role": "assistant", "content": "3"},
            ]
        ),
    ),
    "Dolly": (
        {"instruction": "why", "context": "", "response": "yes"},
        "alpaca",
        Conversation([USER, ANSWER]),
    ),
    "prompt as messages in JSON text": (
        {"prompt": json.dumps([SYSTEM, USER]), "response": "yes"},
        "prompt",
        Conversation([SYSTEM, USER, ANSWER]),
    ),
    "a prompt that is some other list in JSON": (
        {"prompt": "[1, 2]", "response": "yes"},
        "prompt",
        Conversation([{"role": "user", "content": "[1, 2]"}, ANSWER]),
    ),
    "labels": ({"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, "tokens", Tokens([5, 6, 7], [0, 1, 1])),
    "padding is cut": (
        {"input_ids": [0, 5, 6, 0], "labels": [-100, 5, 6, -100], "attention_mask": [0, 1, 1, 0]},
        "tokens",
        Tokens([5, 6], [1, 1]),
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
        "the form messages is that of the source's first row or of --format; got keys: text",
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
    "a role nobody knows among messages": (
        {"messages": [{"role": "narrator", "content": "x"}]},
        None,
        "unknown role",
        "'narrator'",
    ),
    "half a mask": (
        {"messages": [{**ANSWER, "weight": 0.5}]},
        None,
        "malformed message",
        '"weight" to be 0, 1, true or false, got 0.5',
    ),
    "a mask of two senses": (
        {"messages": [{**ANSWER, "mask": 0}]},
        None,
        "malformed message",
        '"mask" can mean',
    ),
    "masks that contradict": (
        {"messages": [{**ANSWER, "weight": 0, "train": True}]},
        None,
        "malformed message",
        "weight, train contradict",
    ),
    "both kinds of calls": (
        {"messages": [{**ANSWER, "tool_calls": [CALL], "function_call": {"name": "f"}}]},
        None,
        "malformed message",
        "both tool_calls and function_call",
    ),
    "a pair of preferences": (
        {"chosen": [USER, ANSWER], "rejected": [USER]},
        None,
        "no known form",
        '"chosen" needs --format preference',
    ),
    "a rejected answer": (
        {"prompt": "x", "completion": "y", "label": False},
        None,
        "a rejected answer",
        "label",
    ),
    "shifted labels": (
        {"input_ids": [1, 2, 3], "labels": [2, 3, -100]},
        None,
        "malformed tokens",
        "not shifted",
    ),
    "labels against a mask": (
        {"input_ids": [1, 2], "labels": [-100, 2], "loss_mask": [1, 1]},
        None,
        "malformed tokens",
        "contradict",
    ),
    "padding inside": (
        {"input_ids": [1, 2, 3], "loss_mask": [1, 1, 1], "attention_mask": [1, 0, 1]},
        None,
        "malformed tokens",
        "zeros between tokens",
    ),
    "rows packed into one": (
        {"input_ids": [1, 2], "loss_mask": [1, 1], "position_ids": [0, 0]},
        None,
        "malformed tokens",
        "unpacked",
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


@pytest.mark.parametrize(
    ("row", "content"),
    [
        ({"chosen": [USER, ANSWER], "rejected": [USER]}, Conversation([USER, ANSWER])),
        ({"prompt": "why", "chosen": "yes", "rejected": "no"}, Conversation([USER, ANSWER])),
        ({"prompt": "why", "chosen": [USER, ANSWER], "rejected": []}, Conversation([USER, ANSWER])),
        ({"prompt": [SYSTEM, USER], "chosen": [ANSWER]}, Conversation([SYSTEM, USER, ANSWER])),
    ],
)
def test_the_better_answer_of_a_preference_is_read_if_asked_for(row, content):
    assert detect_form(row) is None
    assert read_row(row, "preference") == content
