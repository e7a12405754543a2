"""`dspark regenerate --endpoint` against a real HTTP server that breaks in every way a server does."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from capture.regenerate import endpoint, write_jsonl
from tests.capture.stub_server import MODEL, StubServer, stub_server
from tests.conftest import assert_refused, run_cli, run_ok


@pytest.fixture
def server(monkeypatch) -> Iterator[StubServer]:
    monkeypatch.setattr(endpoint, "_FIRST_WAIT_S", 0.002)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with stub_server() as server:
        yield server


def chat(*questions: str, **more) -> dict:
    messages = []
    for question in questions:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": "old"}]
    return {"messages": messages, **more}


def arguments(server: StubServer, folder: Path, rows: list[dict] | None, *more: str) -> list[str | Path]:
    if rows is not None:
        write_jsonl(folder / "chats.jsonl", rows)
    files = ["--data", folder / "chats.jsonl", "--out", folder / "out.jsonl"]
    return ["regenerate", "--endpoint", server.url, *files, *more]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answers(row: dict) -> list[str]:
    return [m["content"] for m in row["messages"] if m["role"] == "assistant"]


def test_turn_by_turn_with_everything_else_kept(server, tmp_path):
    system = {"role": "system", "content": "be brief"}
    rows = [chat("a", "b", "c", id=7), chat("d"), {"messages": [{"role": "user", "content": "nobody"}]}]
    rows[1]["messages"].insert(0, system)
    options = ["--temperature", "0.5", "--top-k", "9", "--top-p", "0.8", "--max-new-tokens", "33"]
    out = run_ok(*arguments(server, tmp_path, rows, *options, "--template-arg", "enable_thinking=false"))
    assert "2 conversations" in out
    assert "1 rows kept as they were" in out
    done = read(tmp_path / "out.jsonl")
    assert done[0]["id"] == 7
    assert done[1]["messages"][0] == system
    assert done[2] == rows[2]
    first, second, third = answers(done[0])
    assert first.startswith("To a after []")
    assert second.startswith(f"To b after [u:a; a:{first}]")
    assert third.startswith(f"To c after [u:a; a:{first}; u:b; a:{second}]")
    assert answers(done[1])[0].startswith("To d after [s:be brief]")
    for request in server.requests:
        assert request["model"] == MODEL
        assert (request["temperature"], request["top_p"], request["top_k"]) == (0.5, 0.8, 9)
        assert request["max_tokens"] == 33
        assert request["chat_template_kwargs"] == {"enable_thinking": False}
        assert "tools" not in request
    seeds = [request["seed"] for request in server.requests]
    assert len(set(seeds)) == 4, "turns and rows that ask the same would all be answered the same"
    assert {path.name for path in tmp_path.iterdir()} == {"chats.jsonl", "out.jsonl"}


def test_seeds_repeat_and_differ(server, tmp_path):
    files = []
    for seed in ("0", "0", "1"):
        run_ok(*arguments(server, tmp_path, [chat("a", "b")], "--fresh", "--seed", seed))
        files.append((tmp_path / "out.jsonl").read_bytes())
    assert files[0] == files[1] != files[2]


def test_greedy_and_top_k_0_leave_top_k_out(server, tmp_path):
    run_ok(*arguments(server, tmp_path, [chat("a")], "--temperature", "0"))
    run_ok(*arguments(server, tmp_path, [chat("a")], "--fresh", "--top-k", "0"))
    assert not any("top_k" in request for request in server.requests)


FAULTS = ["500", "503", "429", "408", "drop", "cut", "garbage", "empty", "html"]


def test_every_passing_fault_is_tried_again_and_leaves_no_trace(server, tmp_path):
    rows = [chat(f"q{i}", "and then") for i in range(len(FAULTS))]
    run_ok(*arguments(server, tmp_path, rows))
    undisturbed = (tmp_path / "out.jsonl").read_bytes()
    server.tries.clear()
    server.faults = {f"q{i}": [fault] for i, fault in enumerate(FAULTS)}
    server.faults["q0"] = ["500", "drop", "garbage"]
    run_ok(*arguments(server, tmp_path, rows, "--fresh"))
    assert (tmp_path / "out.jsonl").read_bytes() == undisturbed
    assert server.tries["q0"] == 4
    assert all(server.tries[f"q{i}"] == 2 for i in range(1, len(FAULTS)))
    assert not any(server.faults.values())


def test_a_time_out_is_tried_again(server, tmp_path):
    server.faults = {"a": ["hang"]}
    run_ok(*arguments(server, tmp_path, [chat("a")], "--timeout", "0.5"))
    assert server.tries["a"] == 2


def test_rows_that_fail_go_to_a_side_file_and_are_tried_again_alone(server, tmp_path):
    rows = [chat("a"), chat("b", "long"), chat("c"), chat("d"), chat("e"), chat("f", "g")]
    server.faults = {
        "long": ["400"],
        "c": ["500"] * 3,
        "d": ["drop"] * 3,
        "e": ["content_filter"],
    }
    command = arguments(server, tmp_path, rows, "--retries", "2")
    result = run_cli(*command)
    assert_refused(result, 1, "4 of 6 rows failed", "chats.jsonl:2", "HTTP 400: stub says 400", "retry them")
    assert "2 conversations" in result.stdout
    assert [row["messages"][0]["content"] for row in read(tmp_path / "out.jsonl")] == ["a", "f"]
    failed = read(tmp_path / "out.jsonl.failed.jsonl")
    assert [(f["row"], f["turn"]) for f in failed] == [(2, 2), (3, 1), (4, 1), (5, 1)]
    assert failed[0]["where"].endswith("chats.jsonl:2")
    assert "HTTP 500" in failed[1]["reason"]
    assert "3 tries" in failed[1]["reason"]
    assert "3 tries" in failed[2]["reason"]
    assert "content_filter" in failed[3]["reason"]
    assert server.tries["long"] == 1, "a 400 is no passing fault"
    server.tries.clear()
    assert "6 conversations" in run_ok(*command)
    assert set(server.tries) == {"long", "c", "d", "e"}
    assert [row["messages"][0]["content"] for row in read(tmp_path / "out.jsonl")] == list("abcdef")
    assert {path.name for path in tmp_path.iterdir()} == {"chats.jsonl", "out.jsonl"}
    resumed = (tmp_path / "out.jsonl").read_bytes()
    run_ok(*command, "--fresh")
    assert (tmp_path / "out.jsonl").read_bytes() == resumed


def test_requests_are_concurrent_and_bounded(server, tmp_path):
    server.meet = threading.Barrier(4)  # nobody is answered before four are there
    run_ok(*arguments(server, tmp_path, [chat(f"q{i}", "then") for i in range(8)], "--concurrency", "4"))
    assert server.most_in_flight == 4
    server.meet, server.most_in_flight = None, 0
    more = ["--fresh", "--concurrency", "1"]
    run_ok(*arguments(server, tmp_path, [chat(f"q{i}") for i in range(3)], *more))
    assert server.most_in_flight == 1


def test_output_is_in_input_order_whatever_comes_first(server, tmp_path):
    server.faults = {"q0": ["slow"], "q2": ["slow"]}
    run_ok(*arguments(server, tmp_path, [chat(f"q{i}", "then") for i in range(6)]))
    done = read(tmp_path / "out.jsonl")
    assert [row["messages"][0]["content"] for row in done] == [f"q{i}" for i in range(6)]
    second_turns = [r["messages"][0]["content"] for r in server.requests if len(r["messages"]) == 3]
    assert second_turns[0] != "q0"


def test_an_interrupt_keeps_what_is_answered(server, tmp_path):
    rows = [chat(f"q{i}", f"then{i}") for i in range(8)]
    run_ok(*arguments(server, tmp_path, rows))
    undisturbed = (tmp_path / "out.jsonl").read_bytes()
    (tmp_path / "out.jsonl").unlink()
    server.tries.clear()
    server.faults = {"then5": ["hang"]}
    plain, interrupts = server.say, [signal.SIGINT]

    def say(request: dict) -> dict:
        if len(server.requests) >= 16 + 13 and interrupts:  # two requests may have come at once
            os.kill(os.getpid(), interrupts.pop())
        return plain(request)

    server.say = say
    command = arguments(server, tmp_path, rows, "--concurrency", "2")
    assert_refused(run_cli(*command), 1, "interrupted", "out.jsonl.progress", "to continue")
    assert not (tmp_path / "out.jsonl").exists()
    kept = len((tmp_path / "out.jsonl.progress").read_bytes().splitlines()) - 1
    assert kept >= 8
    server.say = plain
    asked = len(server.requests)
    run_ok(*command)
    assert len(server.requests) - asked == 16 - kept
    assert (tmp_path / "out.jsonl").read_bytes() == undisturbed


def test_an_endpoint_that_goes_away_stops_the_run_instead_of_failing_its_rows(server, tmp_path):
    rows = [chat(f"q{i}") for i in range(20)]
    server.faults = {f"q{i}": ["drop"] * 9 for i in range(4, 20)}
    plain = server.say

    def say(request: dict) -> dict:
        server.models = 500
        return plain(request)

    server.say = say
    command = arguments(server, tmp_path, rows, "--retries", "2", "--concurrency", "2")
    assert_refused(run_cli(*command), 1, "stopped answering", "to continue")
    assert not (tmp_path / "out.jsonl.failed.jsonl").exists()
    server.faults, server.models, server.say = {}, [MODEL], plain
    server.tries.clear()
    assert "20 conversations" in run_ok(*command)
    assert len(server.tries) == 16


def test_nobody_there_is_one_line_at_once(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    write_jsonl(tmp_path / "chats.jsonl", [chat("a")])
    files = ["--data", tmp_path / "chats.jsonl", "--out", tmp_path / "out.jsonl"]
    result = run_cli("regenerate", "--endpoint", url, *files)
    assert_refused(result, 1, url, "does not answer", "--endpoint")
    assert {path.name for path in tmp_path.iterdir()} == {"chats.jsonl"}


@pytest.mark.parametrize(("status", "remedy"), [("401", "OPENAI_API_KEY"), ("404", "--model")])
def test_what_every_row_would_meet_is_one_line(server, tmp_path, status, remedy):
    server.faults = {f"q{i}": [status] for i in range(9)}
    result = run_cli(*arguments(server, tmp_path, [chat(f"q{i}") for i in range(9)], "--concurrency", "2"))
    assert_refused(result, 1, f"HTTP {status}: stub says {status}", remedy)
    assert len(server.requests) <= 2


def test_the_key_comes_from_the_environment(server, tmp_path, monkeypatch):
    run_ok(*arguments(server, tmp_path, [chat("a")]))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-mine")
    run_ok(*arguments(server, tmp_path, [chat("a")], "--fresh"))
    assert server.keys == ["Bearer none", "Bearer sk-mine"]
    assert "sk-mine" not in (tmp_path / "out.jsonl").read_text()


def test_which_model(server, tmp_path):
    server.models = ["one", "two"]
    command = arguments(server, tmp_path, [chat("a")], "--fresh")
    assert_refused(run_cli(*command), 2, "one, two", "--model")
    run_ok(*command, "--model", "two")
    run_ok(*command, "--target", "org/three")
    server.models = 404
    assert_refused(run_cli(*command), 2, "--model")
    run_ok(*command, "--model", "four")
    server.models = 401
    assert_refused(run_cli(*command, "--model", "four"), 1, "OPENAI_API_KEY")
    assert [request["model"] for request in server.requests] == ["two", "org/three", "four"]


def test_progress_of_another_model_is_refused(server, tmp_path):
    server.faults = {"a": ["400"]}
    command = arguments(server, tmp_path, [chat("a")])
    assert_refused(run_cli(*command), 1, "1 of 1 rows failed")
    assert_refused(run_cli(*command, "--model", "other"), 2, f"model {MODEL}, not other", "--fresh")
    run_ok(*command, "--concurrency", "2", "--retries", "1")  # these don't decide what is said


CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}


def test_tools_and_calls_are_passed_through(server, tmp_path):
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    turns = [
        {"role": "user", "content": "add 1 and 2"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "3"},
        {"role": "assistant", "content": "old", "reasoning_content": "another's thoughts", "name": "bot"},
    ]
    run_ok(*arguments(server, tmp_path, [{"messages": turns, "tools": tools}]))
    (row,) = read(tmp_path / "out.jsonl")
    assert row["tools"] == tools
    assert row["messages"][:3] == turns[:3]
    assert row["messages"][3].keys() == {"role", "content", "name"}
    (request,) = server.requests
    assert request["tools"] == tools
    assert json.loads(request["messages"][1]["tool_calls"][0]["function"]["arguments"]) == {"a": 1, "b": 2}
    assert request["messages"][2] == turns[2]


def test_what_the_target_itself_thinks_and_calls(server, tmp_path):
    def say(request: dict) -> dict:
        return {"content": None, "reasoning_content": "I'd better add", "tool_calls": [CALL]}

    server.say = say
    result = run_cli(*arguments(server, tmp_path, [chat("a"), chat("b", "c")]))
    assert_refused(result, 1, "1 of 2 rows failed", "chats.jsonl:2", "calls a tool")
    (row,) = read(tmp_path / "out.jsonl")
    assert row["messages"][1] == {
        "role": "assistant",
        "content": "",
        "reasoning_content": "I'd better add",
        "tool_calls": [CALL],
    }


def test_unfinished_answers_are_trimmed(server, tmp_path):
    server.say = lambda request: {"content": " One. Two. Thr"}
    server.faults = {"b": ["length"]}
    run_ok(*arguments(server, tmp_path, [chat("a"), chat("b")]))
    assert [answers(row) for row in read(tmp_path / "out.jsonl")] == [["One. Two. Thr"], ["One. Two."]]
    server.say = lambda request: {"content": None, "reasoning": "hm, "}
    server.faults = {"b": ["length"]}
    result = run_cli(*arguments(server, tmp_path, [chat("b")], "--fresh"))
    assert_refused(result, 1, "reached --max-new-tokens without any content")


@pytest.mark.parametrize("option", [("--batch-size", "2"), ("--dtype", "float32"), ("--device", "cpu")])
def test_options_of_the_other_engine_are_refused(tmp_path, option):
    files = ["--data", tmp_path / "chats.jsonl", "--out", tmp_path / "out.jsonl"]
    assert_refused(run_cli("regenerate", "--endpoint", "http://x", *files, *option), 2, option[0])
    assert_refused(run_cli("regenerate", *files, "--concurrency", "2"), 2, "--concurrency", "--endpoint")


def test_what_is_no_url(tmp_path):
    write_jsonl(tmp_path / "chats.jsonl", [chat("a")])
    files = ["--data", tmp_path / "chats.jsonl", "--out", tmp_path / "out.jsonl"]
    assert_refused(run_cli("regenerate", "--endpoint", "localhost:8000", *files), 2, "localhost:8000")


def test_the_package_missing_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    write_jsonl(tmp_path / "chats.jsonl", [chat("a")])
    files = ["--data", tmp_path / "chats.jsonl", "--out", tmp_path / "out.jsonl"]
    assert_refused(run_cli("regenerate", "--endpoint", "http://x", *files), 1, "dspark-pipeline[endpoint]")


def test_help_imports_neither_torch_nor_openai():
    code = (
        "import sys; from click.testing import CliRunner; from pipeline.cli import cli\n"
        "result = CliRunner().invoke(cli, ['regenerate', '--help'])\n"
        "assert result.exit_code == 0 and '--endpoint' in result.output, result.output\n"
        "import capture.regenerate\n"
        "print([name for name in ('torch', 'openai', 'transformers', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
