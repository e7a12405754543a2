"""Rows that people's tools write: each gives exactly the right text and mask, or one plain line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from capture.data import tokens
from capture.data.conversations import RowTokenizer
from capture.data.token_cache import token_cache
from capture.options import ReadingOptions
from capture.regenerate.reading import conversation_row, read_dialogues
from pipeline import files
from pipeline.chat.rows import read_row
from pipeline.errors import DataError
from tests.capture.test_cases import END, USER, learned, load, write

ANSWER = {"role": "assistant", "content": "yes"}
CALL = {"name": "f", "arguments": {"a": 1}}
SHOWN = '{"name": "f", "arguments": {"a": 1}}'


def chat(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


def turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}{END}\n"


def calling(calls: Any) -> dict[str, Any]:
    return chat(USER, {"role": "assistant", "content": None, "tool_calls": calls})


ASKED = turn("user", "why")
CALLED = ASKED + turn("assistant", SHOWN)
READ: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "system in parts": (
        chat(USER, ANSWER, system=[{"type": "text", "text": "be kind"}]),
        turn("system", "be kind") + ASKED + turn("assistant", "yes"),
        ["yes" + END],
    ),
    "system_prompt": (
        {"system_prompt": "be kind", "prompt": "why", "response": "yes"},
        turn("system", "be kind") + ASKED + turn("assistant", "yes"),
        ["yes" + END],
    ),
    "one system prompt, written twice": (
        {
            "system": "be kind",
            "conversations": [
                {"from": "system", "value": "be kind"},
                USER,
                {**ANSWER, "weight": 0},
                USER,
                ANSWER,
            ],
        },
        turn("system", "be kind") + (ASKED + turn("assistant", "yes")) * 2,
        ["yes" + END],
    ),
    "call without its object": (
        calling([{"id": "c", "name": "f", "arguments": '{"a": 1}'}]),
        CALLED,
        [SHOWN + END],
    ),
    "calls as texts": (calling([json.dumps({"function": CALL})]), CALLED, [SHOWN + END]),
    "function as text": (calling([{"function": json.dumps(CALL)}]), CALLED, [SHOWN + END]),
    "no function_call, from a columnar file": (
        chat(USER, {**ANSWER, "function_call": {"name": None, "arguments": None}}),
        ASKED + turn("assistant", "yes"),
        ["yes" + END],
    ),
    "mask of a question": (
        chat({**USER, "weight": "x", "mask": 1}, ANSWER),
        ASKED + turn("assistant", "yes"),
        ["yes" + END],
    ),
    "alpaca with spaces as its input": (
        {"instruction": "why", "input": " ", "output": "yes"},
        ASKED + turn("assistant", "yes"),
        ["yes" + END],
    ),
    "alpaca with the question in its input": (
        {"instruction": "", "input": "why", "output": "yes"},
        ASKED + turn("assistant", "yes"),
        ["yes" + END],
    ),
}


@pytest.mark.parametrize("name", READ)
def test_what_is_meant_is_read(tmp_path, name):
    row, text, answers = READ[name]
    tokenizer, data = load(write(tmp_path / "a.jsonl", row))
    assert tokenizer.decode(data[0].input_ids) == text.removesuffix("\n")
    assert learned(tokenizer, data[0]) == answers


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "system object": (
        chat(USER, ANSWER, system={"a": 1}),
        '"system" is not text: expected a string, got dict',
    ),
    "two system prompts": (
        chat({"role": "system", "content": "one"}, USER, ANSWER, system="two"),
        '"system" and the first message are two different system prompts: keep one of them',
    ),
    "images of the row": (
        chat(USER, ANSWER, images=["a.png"]),
        "the row has 'images', but only text is captured",
    ),
    "audio of a message": (
        chat({**USER, "audio": {"id": 1}}, ANSWER),
        "message 0 has 'audio', but only text",
    ),
    "no messages": (chat(), 'expected "messages" to be a list of messages, got an empty list'),
    "messages of Python": (
        {"messages": str([USER, ANSWER])},
        'expected "messages" to be a list of messages, got text that is no list in JSON',
    ),
    "functions": (
        chat(USER, ANSWER, functions={"name": "f"}),
        'expected "functions" to be a list of JSON schemas',
    ),
    "call without a name": (calling([{"function": {}}]), "expected each tool call to name its function"),
    "history": ({"instruction": "why", "output": "yes", "history": 5}, 'expected "history" to be a list of'),
    "weight as text": (chat(USER, {**ANSWER, "weight": "0"}), "to be 0, 1, true or false, got '0'"),
    "long token": ({"input_ids": [5, 10**300], "loss_mask": [1, 1]}, f"token id {'1' + 39 * '0'} is outside"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_read_is_one_plain_line(tmp_path, name):
    row, words = REFUSED[name]
    with pytest.raises(DataError) as caught:
        load(write(tmp_path / "a.jsonl", row))
    assert (
        f"a.jsonl:1: {words}" in str(caught.value) or words in str(caught.value).partition("a.jsonl:1: ")[2]
    )
    assert "\n" not in str(caught.value)


def test_tools_of_the_older_key_may_be_text():
    schemas = [{"name": "f"}]
    read = [read_row(chat(USER, ANSWER, functions=given)) for given in (schemas, json.dumps(schemas))]
    assert read[0] == read[1]
    assert read[0].tools == [{"type": "function", "function": {"name": "f"}}]


def test_an_object_with_a_key_twice_loses_neither_value(tmp_path):
    line = '{"messages": [{"role": "user", "content": "a", "content": "b"}]}'
    (tmp_path / "a.jsonl").write_text(json.dumps(chat(USER, ANSWER)) + "\n" + line + "\n")
    with pytest.raises(DataError, match=r"a\.jsonl:2: not JSON \(an object has the key 'content' twice\)"):
        load(tmp_path / "a.jsonl")
    assert len(load(tmp_path / "a.jsonl", bad_rows="skip")[1]) == 1
    (tmp_path / "a.json").write_text(f"[{line}]")
    with pytest.raises(DataError, match=r"a\.json: not JSON \(an object has the key 'content' twice\)"):
        load(tmp_path / "a.json")


def test_a_column_twice_is_refused(tmp_path):
    column = pa.array(["a b"])
    pq.write_table(pa.Table.from_arrays([column, column], names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: expected each column once, got: text, text"):
        load(tmp_path / "a.parquet")


def test_a_map_of_a_columnar_file_is_an_object(tmp_path):
    arguments = pa.array([[("a", "1"), ("b", None)]], pa.map_(pa.string(), pa.string()))
    function = pa.StructArray.from_arrays([pa.array(["f"]), arguments], names=["name", "arguments"])
    pq.write_table(pa.table({"messages": pa.array([[USER]]), "call": function}), tmp_path / "a.parquet")
    rows = list(tokens.sources.open_sources([str(tmp_path / "a.parquet")])[0].rows())
    assert rows == [(0, {"messages": [USER], "call": {"name": "f", "arguments": {"a": "1"}}})]


@pytest.mark.parametrize(("opening", "closing"), ["[]", "{}"])
def test_a_deeply_nested_row_stops_nothing(tmp_path, opening, closing):
    opening = opening + '"a": ' * (opening == "{")
    line = '{"text": "a b", "x": ' + opening * 800 + "1" + closing * 800 + "}\n"
    (tmp_path / "a.jsonl").write_text(line + json.dumps({"text": "c d"}) + "\n")
    assert len(load(tmp_path / "a.jsonl", bad_rows="skip")[1]) == 1
    with pytest.raises(DataError, match=r"a\.jsonl:1: lists or objects are nested too deeply to be read"):
        load(tmp_path / "a.jsonl")


def test_an_unforeseen_failure_of_a_row_is_that_of_a_bad_row(tmp_path, monkeypatch):
    real = RowTokenizer.read

    def read(self: RowTokenizer, row: Any, form: str | None = None) -> Any:
        if b"odd" in row:
            raise TypeError("no such thing")
        return real(self, row, form)

    monkeypatch.setattr(RowTokenizer, "read", read)
    path = write(tmp_path / "a.jsonl", {"text": "a b"}, {"text": "odd"}, {"text": "c d"})
    with pytest.raises(DataError, match=r"a\.jsonl:2: this row can't be read \(TypeError: no such thing\)"):
        load(path)
    data = load(path, bad_rows="skip")[1]
    assert len(data) == 2
    assert data.rows["dropped: bad row, not readable"] == 1


MIXED = [
    {"prompt": "why", "response": "yes", "messages": None},
    {"prompt": "why", "response": "no", "messages": [USER, ANSWER]},
]


def test_regenerate_reads_the_form_of_a_source_as_capture_does(tmp_path):
    path = write(tmp_path / "a.jsonl", *MIXED)
    tokenizer, data = load(path)
    assert [learned(tokenizer, sample) for sample in data] == [["yes" + END], ["no" + END]]
    rows = [dialogue.row for dialogue in read_dialogues(ReadingOptions(data=(str(path),)))]
    assert [row["messages"][1]["content"] for row in rows] == ["yes", "no"]


def test_regenerate_refuses_rows_of_another_form_as_capture_does(tmp_path):
    path = write(tmp_path / "a.jsonl", chat(USER, ANSWER), {"prompt": "why", "response": "yes"})
    said = []
    for read in (load, lambda path: read_dialogues(ReadingOptions(data=(str(path),)))):
        with pytest.raises(DataError) as caught:
            read(path)
        said.append(str(caught.value))
    assert said[0] == said[1]


def test_regenerate_gives_calls_as_capture_does():
    texts = [{"id": "c", "type": "function", "function": {**CALL, "arguments": '{"a": 1}'}}]
    kept = chat(USER, {**ANSWER, "tool_calls": texts})
    assert conversation_row(kept) == kept
    whole = [{"type": "function", "function": CALL}]
    for given in ([CALL], json.dumps(whole), [json.dumps(CALL)]):
        row = conversation_row(chat(USER, {**ANSWER, "tool_calls": given}))
        assert row["messages"][1]["tool_calls"] == whole


def test_what_a_killed_process_left_is_removed_when_its_tokens_are_there(tmp_path):
    path = write(tmp_path / "a.jsonl", chat(USER, ANSWER))
    load(path)
    left = token_cache() / files.partial_name("x.arrow", pid=2**22 - 3)
    left.write_bytes(b"half")
    load(path)  # nothing is tokenised again
    assert not left.exists()


def test_what_another_user_left_stops_nothing(tmp_path, monkeypatch):
    left = tmp_path / files.partial_name("x.arrow", pid=2**22 - 3)
    left.write_bytes(b"half")

    def refuse(self: Path, missing_ok: bool = False) -> None:
        raise PermissionError(1, "Operation not permitted", str(self))

    monkeypatch.setattr(Path, "unlink", refuse)
    files.remove_partials(tmp_path)
    assert left.exists()
