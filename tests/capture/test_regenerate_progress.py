"""Runs of `dspark regenerate` that are stopped: nothing is lost, nothing is doubled, nothing is mixed."""

from __future__ import annotations

import copy
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capture.regenerate import Dialogue, regenerate_file, write_jsonl
from capture.regenerate.engine import Outcome, Report
from capture.regenerate.run import check_output
from pipeline.errors import DSparkError, UsageError
from tests.conftest import assert_refused, run_cli, run_ok
from tests.tiny import make_conversations, make_target

RUN = {"model": "m", "seed": 0, "data": "d" * 64}
TURNS = [2, 0, 1, 3, 1]
ALL = sum(TURNS)


class Stopped(BaseException):
    """As a kill: nothing that handles errors sees it."""


class Parrot:
    """Answers two dialogues' turns at once with what it was asked; fails or stops where it is told to."""

    def __init__(self, *, failing: Sequence[int] = (), stop_after: int | None = None):
        self.failing, self.stop_after = failing, stop_after
        self.asked: list[tuple[int, int]] = []

    def answer(self, dialogues: Sequence[Dialogue], report: Report) -> None:
        while True:
            given_up = {number for number, _ in self.asked if number in self.failing}
            open_ones = [d for d in dialogues if not d.finished and d.number not in given_up][:2]
            if not open_ones:
                return
            if self.stop_after is not None and len(self.asked) >= self.stop_after:
                raise Stopped
            self.asked += [(d.number, len(d.answers)) for d in open_ones]
            report([self._outcome(d) for d in open_ones])

    def _outcome(self, dialogue: Dialogue) -> Outcome:
        if dialogue.number in self.failing:
            return Outcome(dialogue, failure="won't say")
        heard = "|".join(message["content"] for message in dialogue.prompt())
        return Outcome(dialogue, {"content": f"naïve \u2028 <{heard}>"})


def dialogues() -> list[Dialogue]:
    rows = []
    for number, turns in enumerate(TURNS):
        messages = [{"role": "system", "content": f"row {number}"}]
        for turn in range(turns):
            messages.append({"role": "user", "content": f"question {turn}"})
            messages.append({"role": "assistant", "content": "old"})
        rows.append({"messages": messages, "id": number})
    return [Dialogue(number, f"data:{number + 1}", row) for number, row in enumerate(rows)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> bytes:
    out = tmp_path_factory.mktemp("undisturbed") / "out.jsonl"
    parrot = Parrot()
    assert regenerate_file(dialogues(), parrot, out, RUN) == []
    assert len(parrot.asked) == ALL
    assert [path.name for path in out.parent.iterdir()] == ["out.jsonl"]
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").split("\n")[:-1]]
    assert [row["id"] for row in rows] == list(range(len(TURNS)))
    return out.read_bytes()


def stopped(folder: Path, after: int) -> Path:
    """The output path of a run that was stopped."""
    out = folder / "out.jsonl"
    with pytest.raises(Stopped):
        regenerate_file(dialogues(), Parrot(stop_after=after), out, RUN)
    assert not out.exists()
    return out


@given(
    cut=st.floats(0, 1), after=st.integers(0, ALL - 2), rubbish=st.sampled_from([b"", b"\0\0", b"{}\n", b"1"])
)
@settings(max_examples=60, deadline=None)
def test_resumed_from_any_byte(tmp_path_factory, undisturbed, cut, after, rubbish):
    """A kill tears the last write anywhere; a lost disk cache may leave rubbish behind it."""
    out = stopped(tmp_path_factory.mktemp("torn"), after)
    progress = out.with_name("out.jsonl.progress")
    whole = progress.read_bytes()
    header = whole.index(b"\n") + 1
    torn = whole[: round(cut * len(whole))]
    rubbish = rubbish if len(torn) >= header else b""
    progress.write_bytes(torn + rubbish)
    parrot = Parrot()
    regenerate_file(dialogues(), parrot, out, RUN)
    assert out.read_bytes() == undisturbed
    kept = max(torn.count(b"\n") - 1, 0)
    assert len(parrot.asked) == len(set(parrot.asked)) == ALL - kept
    assert [path.name for path in out.parent.iterdir()] == ["out.jsonl"]


def test_stopped_again_and_again(tmp_path, undisturbed):
    out = tmp_path / "out.jsonl"
    for _ in range(ALL // 2 - 1):
        with pytest.raises(Stopped):
            regenerate_file(dialogues(), Parrot(stop_after=1), out, RUN)
    regenerate_file(dialogues(), Parrot(), out, RUN)
    assert out.read_bytes() == undisturbed


def test_a_kill_between_publishing_and_cleaning_up(tmp_path, undisturbed, monkeypatch):
    out = tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr("capture.regenerate.progress.Progress.remove", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            regenerate_file(dialogues(), Parrot(), out, RUN)
    check_output(out, ["chats.jsonl"], fresh=False)
    parrot = Parrot()
    regenerate_file(dialogues(), parrot, out, RUN)
    assert parrot.asked == []
    assert out.read_bytes() == undisturbed


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({**RUN, "seed": 1}, "seed 0, not 1"),
        ({**RUN, "data": "e" * 64}, "data dddddddddddd..., not eeeeeeeeeeee..."),
        ({**RUN, "model": "n", "seed": 2}, "model m, not n; seed 0, not 2"),
        (
            {"model": "m", "data": RUN["data"], "dtype": "float32"},
            "seed 0, not unset; dtype unset, not float32",
        ),
    ],
)
def test_the_progress_of_another_run_is_refused(tmp_path, undisturbed, other, words):
    out = stopped(tmp_path, 4)
    progress = tmp_path / "out.jsonl.progress"
    before = progress.read_bytes()
    with pytest.raises(UsageError, match=r"another run.*--fresh") as refused:
        regenerate_file(dialogues(), Parrot(), out, other)
    assert words in str(refused.value)
    assert progress.read_bytes() == before
    parrot = Parrot()
    regenerate_file(dialogues(), parrot, out, other, fresh=True)
    assert len(parrot.asked) == ALL
    assert out.read_bytes() == undisturbed


def test_a_file_that_is_no_progress_is_left_alone(tmp_path):
    (tmp_path / "out.jsonl.progress").write_text('{"messages": []}\n')
    with pytest.raises(UsageError, match="not a progress file"):
        regenerate_file(dialogues(), Parrot(), tmp_path / "out.jsonl", RUN)
    assert (tmp_path / "out.jsonl.progress").read_text() == '{"messages": []}\n'


def test_two_at_once_are_refused(tmp_path):
    out = stopped(tmp_path, 2)
    with (tmp_path / "out.jsonl.progress").open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(DSparkError, match="another process"):
            regenerate_file(dialogues(), Parrot(), out, RUN, fresh=True)
    regenerate_file(dialogues(), Parrot(), out, RUN)


def test_failed_rows_are_listed_and_asked_again_alone(tmp_path, undisturbed):
    out, failed = tmp_path / "out.jsonl", tmp_path / "out.jsonl.failed.jsonl"
    failures = regenerate_file(dialogues(), Parrot(failing=[4, 0]), out, RUN)
    assert [failure.dialogue.number for failure in failures] == [0, 4]
    lines = undisturbed.splitlines(keepends=True)
    assert out.read_bytes() == b"".join(lines[1:4])
    rows = [json.loads(line) for line in failed.read_text().splitlines()]
    assert rows[0] == {"row": 1, "where": "data:1", "turn": 1, "reason": "won't say"}
    assert rows[1]["row"] == 5
    check_output(out, ["chats.jsonl"], fresh=False)
    regenerate_file(dialogues(), Parrot(failing=[4]), out, RUN)
    assert [json.loads(line)["row"] for line in failed.read_text().splitlines()] == [5]
    parrot = Parrot()
    regenerate_file(dialogues(), parrot, out, RUN)
    assert parrot.asked == [(4, 0)]
    assert out.read_bytes() == undisturbed
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_rows_are_left_as_they_were():
    before = dialogues()
    rows = [copy.deepcopy(dialogue.row) for dialogue in before]
    Parrot().answer(before, lambda outcomes: [o.dialogue.answers.append(o.answer) for o in outcomes] and None)
    assert [dialogue.row for dialogue in before] == rows


# Through the command line, with a tiny target in this process


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Path:
    return make_target(tmp_path_factory.mktemp("target") / "tiny", dtype=torch.float32, num_hidden_layers=2)


def command(target: Path, data: Path, out: Path, *more: str) -> list[str]:
    options = ["--max-new-tokens", "20", "--batch-size", "3", "--temperature", "1", "--device", "cpu", *more]
    return ["regenerate", *map(str, ["--target", target, "--data", data, "--out", out]), *options]


def test_sigkill_and_rerun_gives_the_bytes_of_an_undisturbed_run(tmp_path, target):
    data = make_conversations(tmp_path / "chats.jsonl", count=16)
    undisturbed, out = tmp_path / "undisturbed.jsonl", tmp_path / "out.jsonl"
    run_ok(*command(target, data, undisturbed))
    progress = tmp_path / "out.jsonl.progress"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    arguments = [sys.executable, "-m", "pipeline", *command(target, data, out)]
    with subprocess.Popen(arguments, env=environment, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (progress.exists() and progress.read_bytes().count(b"\n") > 4):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    turns = data.read_text().count('"assistant"')
    kept = progress.read_bytes().count(b"\n") - 1
    assert 4 <= kept < turns
    assert not out.exists()
    with progress.open("ab") as torn:
        torn.write(b'{"row": 3, "tu')
    assert_refused(run_cli(*command(target, data, out, "--seed", "1")), 2, "another run", "seed 0, not 1")
    assert "16 conversations" in run_ok(*command(target, data, out))
    assert out.read_bytes() == undisturbed.read_bytes()
    assert not progress.exists()


def test_an_output_that_is_there_is_kept_unless_fresh(tmp_path, target):
    data = make_conversations(tmp_path / "chats.jsonl", count=2)
    out = tmp_path / "out.jsonl"
    out.write_text("precious")
    assert_refused(run_cli(*command(target, data, out)), 2, "exists already", "--fresh")
    assert out.read_text() == "precious"
    run_ok(*command(target, data, out, "--fresh"))
    assert len(out.read_text().splitlines()) == 2


def test_an_output_that_would_be_its_own_data_is_refused(tmp_path, target):
    data = make_conversations(tmp_path / "chats.jsonl", count=2)
    before = data.read_bytes()
    assert_refused(run_cli(*command(target, data, data, "--fresh")), 2, "elsewhere")
    assert_refused(run_cli(*command(target, tmp_path, tmp_path / "out.jsonl")), 2, "elsewhere")
    assert_refused(run_cli(*command(target, data, tmp_path, "--fresh")), 2, "directory")
    assert data.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["chats.jsonl"]


def test_an_interrupt_is_one_line(tmp_path, target, monkeypatch):
    data, out = make_conversations(tmp_path / "chats.jsonl", count=6), tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.target_model.load.load_target", lambda *_: signal.raise_signal(signal.SIGINT))
        assert_refused(run_cli(*command(target, data, out)), 1, "interrupted", "out.jsonl.progress")
    assert "6 conversations" in run_ok(*command(target, data, out))


def test_rows_that_a_target_cannot_answer(tmp_path, target):
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "old"}]},
        {"messages": [{"role": "assistant", "content": "hello"}]},
        {
            "messages": [
                {"role": "user", "content": "the cat " * 250},
                {"role": "assistant", "content": "old"},
            ]
        },
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "old"}]},
    ]
    data, out = tmp_path / "chats.jsonl", tmp_path / "out.jsonl"
    write_jsonl(data, rows)
    result = run_cli(*command(target, data, out))
    assert_refused(result, 1, "2 of 4 rows failed", "chats.jsonl:2", "opens", "out.jsonl.failed.jsonl")
    assert len(out.read_text().splitlines()) == 2
    failed = [json.loads(line) for line in (tmp_path / "out.jsonl.failed.jsonl").read_text().splitlines()]
    assert [row["row"] for row in failed] == [2, 3]
    assert "exceed the 512 positions" in failed[1]["reason"]
    first = out.read_bytes()
    assert run_cli(*command(target, data, out)).exit_code == 1
    assert out.read_bytes() == first
