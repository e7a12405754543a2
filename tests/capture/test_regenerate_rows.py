"""Rows that `dspark regenerate` reads: which it answers, which it keeps, and what it says of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from capture.regenerate import write_jsonl
from pipeline.cache import CacheReader
from tests.capture.stub_server import StubServer, stub_server
from tests.conftest import FP32, assert_refused, run_cli, run_ok
from tests.tiny import CHATML, make_target

ASK = {"role": "user", "content": "why"}
OLD = {"role": "assistant", "content": "old"}
CALL = {"type": "function", "function": {"name": "add", "arguments": "{}"}}
CALLS = [ASK, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "1"}]


@pytest.fixture
def server(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with stub_server() as server:
        yield server


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    return make_target(tmp_path_factory.mktemp("target") / "tiny", num_hidden_layers=3)


def command(server: StubServer, out: Path, *data: Path) -> list[str | Path]:
    sources = [part for path in data for part in ("--data", path)]
    return ["regenerate", "--endpoint", server.url, "--out", out, *sources]


def write(path: Path, *rows: dict) -> Path:
    write_jsonl(path, rows)
    return path


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    "names", [("human", "gpt"), ("User", "Assistant"), ("user", "model"), ("human", "bot")]
)
def test_turns_by_any_name_of_the_assistant_are_answered(server, tmp_path, target, names):
    messages = [{"role": names[0], "content": "why"}, {"role": names[1], "content": "old", "weight": 0}]
    data, out = write(tmp_path / "in.jsonl", {"id": 7, "messages": messages}), tmp_path / "out.jsonl"
    assert "1 conversations with the target's own" in run_ok(*command(server, out, data))
    (row,) = read(out)
    assert row["id"] == 7
    assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
    assert row["messages"][1]["content"].startswith("To why after")
    assert row["messages"][1]["weight"] == 0
    assert [message["role"] for message in server.requests[0]["messages"]] == ["user"]


def test_what_regenerate_writes_is_captured(server, tmp_path, target):
    rows = [{"messages": [{**ASK, "content": f"why {i}"}, OLD], "id": i} for i in range(3)]
    out, cache = tmp_path / "out.jsonl", tmp_path / "cache"
    run_ok(*command(server, out, write(tmp_path / "in.jsonl", *rows)))
    run_ok("capture", "--target", target, "--layers", "0,1", *FP32, "--data", out, "--cache", cache)
    assert CacheReader(cache).manifest.rows == {"read": 3, "captured": 3}


def test_rows_without_a_turn_to_answer_are_counted_apart(server, tmp_path):
    rows = [{"messages": [ASK, OLD]}, {"messages": [ASK]}, {"messages": CALLS}]
    data, out = write(tmp_path / "in.jsonl", *rows), tmp_path / "out.jsonl"
    printed = run_ok(*command(server, out, data))
    assert "1 conversations with the target's own" in printed
    assert "2 rows kept as they were" in printed
    assert read(out)[1:] == rows[1:]


def test_data_with_nothing_to_answer_is_refused(server, tmp_path):
    data, out = write(tmp_path / "in.jsonl", {"messages": [ASK]}), tmp_path / "out.jsonl"
    assert_refused(run_cli(*command(server, out, data)), 1, "no row has an assistant turn to answer")
    assert_refused(run_cli(*command(server, out)), 2, "--data")
    assert not out.exists()


def test_text_is_a_bad_row_that_may_be_skipped(server, tmp_path):
    texts, out = write(tmp_path / "texts.jsonl", {"text": "once"}), tmp_path / "out.jsonl"
    assert_refused(run_cli(*command(server, out, texts)), 1, "texts.jsonl:1", "got text or tokens")
    chats = write(tmp_path / "in.jsonl", {"messages": [ASK, OLD]}, {"text": "once"})
    result = run_cli(*command(server, out, texts, chats), "--bad-rows", "skip")
    assert result.exit_code == 0
    assert "skipped" in result.stderr
    assert "texts.jsonl:1" in result.stderr
    assert "in.jsonl:2" in result.stderr
    assert len(read(out)) == 1


def test_several_sources_and_a_number_of_rows(server, tmp_path):
    a = write(tmp_path / "a.jsonl", *({"messages": [{**ASK, "content": f"a{i}"}, OLD]} for i in range(2)))
    b = write(tmp_path / "b.jsonl", *({"prompt": f"b{i}", "response": "old"} for i in range(2)))
    out = tmp_path / "out.jsonl"
    run_ok(*command(server, out, a, b), "--num-samples", "3")
    assert [row["messages"][0]["content"] for row in read(out)] == ["a0", "a1", "b0"]
    assert_refused(run_cli(*command(server, out, a), "--fresh", "--split", "test"), 2, "--split")
    below = tmp_path / "sub"
    below.mkdir()
    assert_refused(run_cli(*command(server, below / "out.jsonl", tmp_path)), 2, "elsewhere")


def test_a_template_of_the_callers_own_decides_the_answers(tmp_path, target, server):
    data, out = write(tmp_path / "in.jsonl", {"messages": [ASK, OLD]}), tmp_path / "out.jsonl"
    run = [
        "regenerate",
        "--target",
        target,
        *FP32,
        "--data",
        data,
        "--max-new-tokens",
        "5",
        "--temperature",
        "0",
    ]
    same, other, bad = (tmp_path / f"{name}.jinja" for name in ("same", "other", "bad"))
    same.write_text(CHATML)
    other.write_text(CHATML.replace("assistant", "system"))
    run_ok(*run, "--out", out)
    run_ok(*run, "--out", tmp_path / "same.jsonl", "--chat-template", same)
    assert (tmp_path / "same.jsonl").read_bytes() == out.read_bytes()
    bad.write_text("{{ raise_exception('not this') }}")
    assert_refused(run_cli(*run, "--out", tmp_path / "c.jsonl", "--chat-template", bad), 1, "not this")
    # The progress of one template is not continued with another.
    result = run_cli(*run, "--out", tmp_path / "c.jsonl", "--chat-template", other)
    assert_refused(result, 2, "chat template")
    served = run_cli(*command(server, tmp_path / "d.jsonl", data), "--chat-template", same)
    assert_refused(served, 2, "--chat-template has no effect on an endpoint")


def test_progress_from_before_selections_continues(server, tmp_path):
    """Its header has no key of a selection, which the hash of the rows covers."""
    data, out = write(tmp_path / "in.jsonl", {"messages": [ASK, OLD]}), tmp_path / "out.jsonl"
    server.faults = {"why": ["400"]}
    assert run_cli(*command(server, out, data)).exit_code == 1
    header = json.loads((tmp_path / "out.jsonl.progress").read_text().splitlines()[0])
    sampling = {"max_new_tokens", "temperature", "top_k", "top_p", "seed"}
    assert header["run"].keys() == {"engine", "model", "data", "template arguments", *sampling}
    run_ok(*command(server, out, data))
