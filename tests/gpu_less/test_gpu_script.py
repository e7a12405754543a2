"""`make gpu` runs to its end on the pretend device, goes on where it stopped, and says what fell short."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import figures
from benchmarks.gpu.commands import dspark
from benchmarks.gpu.figures import Limit, Outcome, judged
from benchmarks.gpu.sections import SECTIONS
from benchmarks.gpu.syncs import count_waits
from benchmarks.gpu.work import clear, state_key
from tests.gpu_less.pretend.ledger import ROOT

pytestmark = pytest.mark.gpu_less
RESULTS = ROOT / "benchmarks" / "results.csv"
# On one pretend GPU.
SKIPPED = {"ranks": "needs 2 GPUs, this machine has 1", "example": "its 30 layers take minutes"}
# A line of each section that passed: case, figure, verdict. "-" is of a figure without a limit that counts.
LINES = {
    "machine": ("free memory", "ok"),
    "tiny": ("the resumed run differs by", "ok"),
    "loss": ("time ratio", "-"),
    "step": ("backbone forward", "-"),
    "codecs": ("decode", "-"),
    "loader": ("page-locked", "ok"),
    "capture": ("capture / bare forward", "-"),
    "train": ("host syncs", "ok"),
    "tests": ("passed", "ok"),
}


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Every call of the script, made once for all tests here."""
    folder, before = tmp_path_factory.mktemp("gpu"), hashlib.sha256(RESULTS.read_bytes()).hexdigest()
    command = [sys.executable, "-m", "tests.gpu_less.gpu_script", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert hashlib.sha256(RESULTS.read_bytes()).hexdigest() == before, "a pretend device was recorded"
    return {**json.loads((folder / "calls.json").read_text()), "folder": folder}


def section_of(call: dict, name: str) -> list[str]:
    """The lines of a section in the table: its heading, then its figures."""
    lines = call["out"].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith(f"== {name}:"))
    rest = lines[first + 1 :]
    end = next(
        (i for i, line in enumerate(rest) if line.startswith(("==", "not run")) or "sections passed" in line),
        len(rest),
    )
    return [lines[first], *rest[:end]]


@pytest.mark.parametrize("name", LINES)
def test_every_section_passes_on_the_pretend_device(calls: dict, name: str) -> None:
    heading, *figures = section_of(calls["whole"], name)
    assert heading.startswith(f"== {name}: passed")
    figure, verdict = LINES[name]
    found = [line for line in figures if f" {figure} " in line]
    assert found, figures
    assert all(line.split()[-1] == verdict for line in found), found


def test_the_sections_are_these_and_no_more() -> None:
    assert set(SECTIONS) == LINES.keys() | SKIPPED.keys()


@pytest.mark.parametrize("name", SKIPPED)
def test_what_this_machine_lacks_is_said(calls: dict, name: str) -> None:
    (heading,) = section_of(calls["whole"], name)
    assert heading.startswith(f"== {name}: skipped: {SKIPPED[name]}")


def test_the_whole_script_succeeds(calls: dict) -> None:
    assert calls["whole"]["started"] == list(SECTIONS)
    assert (calls["whole"]["code"], calls["whole"]["err"]) == (0, "")
    assert calls["whole"]["out"].endswith("9 of 11 sections passed, none failed\n")


def test_a_run_that_was_killed_equals_the_other_to_the_last_bit(calls: dict) -> None:
    lines = {line[50:84].strip(): line[85:].split()[0] for line in section_of(calls["whole"], "tiny")[1:]}
    assert lines["exit code of the killed run"] == "-9"
    assert lines["its newest checkpoint's step"] == "2"
    assert lines["the resumed run differs by"] == "0"


def test_what_passed_is_not_repeated(calls: dict) -> None:
    assert calls["again"]["started"] == list(SKIPPED)
    assert calls["again"]["code"] == 0
    for name in LINES:
        heading, *figures = section_of(calls["again"], name)
        assert ", by an earlier call" in heading
        assert figures == section_of(calls["whole"], name)[1:]


def test_what_does_not_fit_the_budget_is_listed_and_no_failure(calls: dict) -> None:
    assert calls["no time"]["started"] == []
    assert calls["no time"]["code"] == 0
    assert f"not run: {', '.join(SECTIONS)}; the same command" in calls["no time"]["out"]


BAD = {
    "short": "short: fell short",
    "crash": "crash: failed: its process ended with exit code 7",
    "wrong": "wrong: failed: ValueError: expected this",
    "endless": "endless: failed: took more than 1 s",
    "missing": "missing: skipped: needs a second GPU",
    "packages": "packages: skipped: needs no_such_package: install with `pip install no_such_package`",
}


@pytest.mark.parametrize("name", BAD)
def test_a_section_that_goes_wrong_says_how_and_the_others_run(calls: dict, name: str) -> None:
    assert section_of(calls["bad"], name)[0].startswith(f"== {BAD[name]}")
    assert section_of(calls["bad"], "good")[0].startswith("== good: passed")


def test_the_exit_code_and_the_error_name_what_fell_short(calls: dict) -> None:
    errors = calls["bad"]["err"].splitlines()
    assert calls["bad"]["code"] == 1
    assert [line.split()[1] for line in errors] == ["short:", "crash:", "wrong:", "endless:"]
    assert errors[0].split() == [
        "error:",
        "short:",
        "case",
        "ratio",
        "3",
        "times",
        "<=",
        "2.5",
        "FELL",
        "SHORT",
    ]
    assert "log " in errors[1]


def test_a_section_that_fell_short_is_repeated_and_one_that_passed_is_not(calls: dict) -> None:
    assert calls["bad again"]["started"] == ["short"]
    assert calls["bad again"]["code"] == 1
    assert calls["fresh"]["started"] == ["good"]


def test_a_section_prints_to_its_log(calls: dict) -> None:
    (log,) = calls["folder"].glob("state/*/good.log")
    assert log.read_text() == "a line of the section\n"
    assert not (log.parent / "good").exists()  # its scratch is removed


def test_limits_hold_at_their_bounds_and_never_for_nan() -> None:
    limit = Limit(at_most=2.0, at_least=1.0)
    held = [limit.holds(value) for value in (0.99, 1.0, 2.0, 2.01, float("nan"))]
    assert held == [
        False,
        True,
        True,
        False,
        False,
    ]
    assert (str(limit), str(Limit(3.0, 3.0)), str(Limit(at_least=0.5))) == ("<= 2 >= 1", "= 3", ">= 0.5")


def test_a_limit_on_nothing_is_an_error() -> None:
    with pytest.raises(AssertionError, match="nothing that was measured"):
        judged([("case", "time", 1.0, "s")], {"rate": Limit(at_most=1.0)}, pretend=False)


def test_waits_of_a_trace_are_those_of_the_steps_threads() -> None:
    """The loop's thread is 1, autograd's 2, the loader's 3."""

    def event(name: str, tid: int, ts: float, cat: str = "cuda_runtime") -> dict:
        return {"name": name, "tid": tid, "ts": ts, "dur": 1.0, "cat": cat}

    events = [
        {**event("ProfilerStep#5", 1, 100.0, "user_annotation"), "dur": 50.0},
        {**event("ProfilerStep#6", 1, 150.0, "user_annotation"), "dur": 50.0},
        {**event("ProfilerStep#6", 7, 300.0, "gpu_user_annotation"), "dur": 50.0},
        event("autograd::engine::evaluate_function: MmBackward0", 2, 120.0, "cpu_op"),
        event("cudaLaunchKernel", 1, 110.0),
        event("cudaStreamSynchronize", 1, 110.0),
        event("cudaStreamSynchronize", 2, 160.0),
        event("cudaEventSynchronize", 3, 130.0),  # the loader may wait
        event("cudaStreamSynchronize", 1, 99.0),  # before the first step
        event("cudaDeviceSynchronize", 1, 201.0),  # the profiler's own, behind the last
    ]
    assert count_waits(events) == {"cudaStreamSynchronize": 2}
    with pytest.raises(ValueError, match="2 steps and 0 calls of CUDA"):
        count_waits(events[:2])


def called(*words: str | Path) -> subprocess.CompletedProcess:
    """The script on this machine, which has no GPU."""
    command = [sys.executable, "-m", "benchmarks.gpu", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_two_calls_at_a_time_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / state_key(pretend=True)
    folder.mkdir()
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = called("--pretend", "--folder", tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: another call works in {folder}: wait for its end\n"


def test_what_other_code_left_on_this_machine_is_removed_but_its_results(tmp_path: Path) -> None:
    old = state_key(pretend=True)[:-1] + "x"
    for name in (old, "pretend-another-machine"):
        (tmp_path / name / "capture").mkdir(parents=True)
        (tmp_path / name / "step.json").write_text("{}")
    assert called("--pretend", "--folder", tmp_path, "--only", "step", "--seconds", "0").returncode == 0
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/*")}
    assert f"{old}/step.json" in left
    assert f"{old}/capture" not in left
    assert "pretend-another-machine/capture" in left


def test_a_cache_is_kept_until_all_sections_that_use_it_are_over(tmp_path: Path) -> None:
    """A section that failed, or did not fit into the budget, needs it in the next call."""
    (tmp_path / "capture").mkdir()
    Outcome("train", figures.PASSED).save(tmp_path / "train.json")
    clear(SECTIONS["train"], tmp_path)
    for status, kept in ((figures.FAILED, True), (figures.SKIPPED, False)):
        Outcome("ranks", status).save(tmp_path / "ranks.json")
        clear(SECTIONS["train"], tmp_path)
        assert (tmp_path / "capture").exists() == kept


def test_a_command_gives_memory_of_the_gpu_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks need all of it, after one process has trained in the section's own."""
    calls: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append(True))
    assert "Usage" in dspark("train", "--help")
    assert calls == [True]


def test_a_section_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    done = called("--folder", tmp_path, "--only", "step,speed")
    assert done.returncode == 2
    assert f"no section speed: expected some of {', '.join(SECTIONS)}" in done.stderr


def test_without_a_gpu_it_says_what_to_do(tmp_path: Path) -> None:
    done = called("--folder", tmp_path, "--only", "machine")
    assert done.returncode == 1
    assert "expected a CUDA device" in done.stderr
    assert "pass --pretend" in done.stderr
    assert len(done.stderr.splitlines()) == 1
