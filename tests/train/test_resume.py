"""Runs that stop: killed at any moment, asked to stop, started again, never different for it."""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import assert_refused, capture_arguments, run_cli, run_ok
from tests.processes import Dspark, die_at, one_thread
from tests.train.runs import (
    checkpoint_names,
    figures_of,
    lines_of,
    progress_of,
    train_arguments,
    weights_of,
)
from train.runs.names import BEST, LATEST
from train.trainer import trainer as loop

OFTEN = {
    "train__log_every": 3,  # lines whose sums begin before a checkpoint and end behind it
    "train__eval_every": 5,
    "train__checkpoint_every": 4,
    "train__micro_batches_per_step": 2,
    "train__weight_decay": 0.1,
}


def one_thread_until_death() -> None:
    one_thread()
    die_at()


def assert_same_run(run: Path, wanted: Path) -> None:
    """Bit for bit: the weights, the optimiser, every figure of every step, the evaluation."""
    for name in ("model.safetensors", "training.safetensors"):
        assert (run / LATEST / name).read_bytes() == (wanted / LATEST / name).read_bytes(), name
    assert figures_of(run) == figures_of(wanted)
    assert progress_of(run)["evaluation"] == progress_of(wanted)["evaluation"]
    assert (run / BEST).resolve().name == (wanted / BEST).resolve().name
    assert checkpoint_names(run) == checkpoint_names(wanted)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    run_ok(*train_arguments(cache_dir, run, train__max_steps=90, **OFTEN))
    return run


@pytest.mark.parametrize("log_every", [1, 3])
def test_killed_at_ten_random_moments(tmp_path: Path, cache_dir: Path, log_every: int) -> None:
    """Five by the clock, five right before a change to the disk, which is mostly within a checkpoint."""
    whole, run, rng = tmp_path / "whole", tmp_path / "run", random.Random(log_every)
    settings = {**OFTEN, "train__max_steps": 160, "train__log_every": log_every}
    run_ok(*train_arguments(cache_dir, whole, **settings))
    arguments = train_arguments(cache_dir, run, **settings)
    for number in range(10):
        if number % 2:
            deadly = str(rng.randrange(1, 40))
            process = Dspark(tmp_path / "out", *arguments, before=one_thread_until_death, DIE_AT=deadly)
        else:
            process = Dspark(tmp_path / "out", *arguments, before=one_thread)
            size = _count_lines(run) + rng.randrange(3)
            assert process.wait_until(lambda size=size: _count_lines(run) > size)
            time.sleep(rng.uniform(0, 0.02))  # a step or two
            process.send(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, process.err
    last = Dspark(tmp_path / "out", *arguments, before=one_thread)
    assert last.wait() == 0, last.err
    assert "continuing from step" in last.err
    assert_same_run(run, whole)
    assert not list(run.rglob("*.partial"))


def _count_lines(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_asked_to_stop_it_saves(tmp_path: Path, cache_dir: Path, uninterrupted: Path, number: int) -> None:
    run = tmp_path / "run"
    arguments = train_arguments(cache_dir, run, train__max_steps=90, **OFTEN)
    process = Dspark(tmp_path / "out", *arguments, before=one_thread)
    assert process.wait_until(lambda: _count_lines(run) >= 3)
    process.send(number)
    assert process.wait() == 128 + number
    (line,) = process.errors
    step = progress_of(run)["step"]
    assert f"stopped by {signal.Signals(number).name}" in line
    assert f"saved at step {step}, the same command continues" in line
    assert 0 < step < 90
    again = Dspark(tmp_path / "out", *arguments, before=one_thread)
    assert again.wait() == 0
    assert f"continuing from step {step} of 90" in again.err
    assert_same_run(run, uninterrupted)


def test_stopped_within_an_evaluation(
    tmp_path: Path, cache_dir: Path, uninterrupted: Path, monkeypatch
) -> None:
    """It is not waited for, and is made up for first thing, even at the very end."""
    run = tmp_path / "run"
    arguments = train_arguments(cache_dir, run, train__max_steps=90, **OFTEN)
    real, steps = loop.validate, []

    def interrupted(*given, **options):
        steps.append(len(steps))
        if len(steps) in (2, 19):  # the whole run's 18 and the second one's repetition: the last
            signal.raise_signal(signal.SIGTERM)
        return real(*given, **options)

    monkeypatch.setattr(loop, "validate", interrupted)
    for step in (10, 90):
        assert_refused(run_cli(*arguments), 143, "stopped by SIGTERM", f"saved at step {step}")
        assert progress_of(run)["evaluated"] == step - 5
        assert not progress_of(run)["complete"]
    run_ok(*arguments)
    assert_same_run(run, uninterrupted)


def test_moved_and_continued(tmp_path: Path, cache_dir: Path, uninterrupted: Path) -> None:
    run, moved = tmp_path / "run", tmp_path / "elsewhere" / "run"
    steps = []

    class Stopping(loop.Training):
        def _step(self, step):
            steps.append(step)
            if len(steps) == 41:
                signal.raise_signal(signal.SIGTERM)
            return super()._step(step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Training", Stopping)
        result = run_cli(*train_arguments(cache_dir, run, train__max_steps=90, **OFTEN))
    assert_refused(result, 143, "step 41")
    moved.parent.mkdir()
    run.rename(moved)
    cache = tmp_path / "cache"
    shutil.copytree(cache_dir, cache)
    run_ok(*train_arguments(cache, moved, train__max_steps=90, **OFTEN))
    assert_same_run(moved, uninterrupted)


def test_a_complete_run_is_left_alone(cache_dir: Path, uninterrupted: Path, tmp_path: Path) -> None:
    def tree() -> dict[str, tuple[int, int]]:
        files = (path for path in uninterrupted.rglob("*") if path.is_file() and path.name != ".lock")
        return {str(p): (p.stat().st_ino, p.stat().st_mtime_ns) for p in files}

    before = tree()
    shown = run_ok(*train_arguments(cache_dir, uninterrupted, train__max_steps=90, **OFTEN))
    assert f"run {uninterrupted}: complete" in shown
    tau = progress_of(uninterrupted)["evaluation"]["tau"]
    assert f"held-out tau {tau:.3f}" in shown
    assert tree() == before


def test_another_config_or_cache_is_refused_with_what_differs(
    tmp_path: Path, cache_dir: Path, target_dir: Path, data_file: Path
) -> None:
    run = tmp_path / "r"
    run_ok(*train_arguments(cache_dir, run, train__max_steps=1))
    result = run_cli(*train_arguments(cache_dir, run, train__max_steps=2, draft__markov_head="rnn"))
    parts = ("train.max_steps: 1 against 2", "draft.markov_head: vanilla against rnn", "--fresh", "--run")
    assert_refused(result, 1, *parts)
    other = tmp_path / "cache"
    run_ok(*capture_arguments(target_dir, data_file, other), "--context-codec", "int8")
    result = run_cli(*train_arguments(other, run, train__max_steps=1))
    assert_refused(result, 1, "cache features.context_codec: bf16 against int8", "--fresh")
    # What is spelt out that was the default anyway is no difference.
    run_ok(*train_arguments(cache_dir, run, train__max_steps=1, draft__target_layer_ids="[0,2,4]"))
    assert progress_of(run)["step"] == 1
    run_ok(*train_arguments(other, run, train__max_steps=2), "--fresh")
    assert progress_of(run)["step"] == 2
    assert [line["step"] for line in lines_of(run)] == [2, 2]


def test_fresh_clears_only_what_is_a_runs(tmp_path: Path, cache_dir: Path) -> None:
    run = tmp_path / "r"
    run_ok(*train_arguments(cache_dir, run, train__max_steps=1))
    (run / "notes.txt").write_text("mine")
    run_ok(*train_arguments(cache_dir, run, train__max_steps=2), "--fresh")
    assert (run / LATEST).resolve().name == "step-000002"
    assert checkpoint_names(run) == ["step-000002"]
    assert (run / "notes.txt").read_text() == "mine"
    stranger = tmp_path / "home"
    stranger.mkdir()
    (stranger / "thesis.tex").write_text("precious")
    for more in ((), ("--fresh",)):
        assert_refused(run_cli(*train_arguments(cache_dir, stranger), *more), 1, "is not a run")
    assert [path.name for path in stranger.iterdir()] == ["thesis.tex"]


def test_one_process_a_run(tmp_path: Path, cache_dir: Path) -> None:
    run = tmp_path / "run"
    arguments = train_arguments(cache_dir, run, train__max_steps=100_000)
    process = Dspark(tmp_path / "out", *arguments, before=one_thread)
    assert process.wait_until(lambda: _count_lines(run))
    for more in ((), ("--fresh",)):
        assert_refused(run_cli(*arguments, *more), 1, "another process is training")
    process.send(signal.SIGTERM)
    assert process.wait() == 143


def test_the_newest_and_the_best_are_kept(tmp_path: Path, cache_dir: Path, monkeypatch) -> None:
    taus = iter([1.2, 1.5, 1.4, 1.3, 1.1])
    real = loop.validate
    monkeypatch.setattr(loop, "validate", lambda *a, **k: {**real(*a, **k), "tau": next(taus)})
    settings = {"train__checkpoint_every": 1, "train__eval_every": 2, "train__keep_checkpoints": 3}
    run_ok(*train_arguments(cache_dir, tmp_path / "r", train__max_steps=10, **settings))
    assert checkpoint_names(tmp_path / "r") == ["step-000004", *(f"step-{n:06d}" for n in (8, 9, 10))]
    assert (tmp_path / "r" / BEST).resolve().name == "step-000004"
    assert (tmp_path / "r" / LATEST).resolve().name == "step-000010"
    shown = [
        run_ok("evaluate", "--cache", cache_dir, "--run", tmp_path / "r", "--json", "--checkpoint", which)
        for which in (BEST, "step-000004", LATEST)
    ]
    assert shown[0] == shown[1] != shown[2]
    missing = run_cli("evaluate", "--cache", cache_dir, "--run", tmp_path / "r", "--checkpoint", "step-5")
    assert_refused(missing, 1, "step-5", "step-000004, step-000008")


def test_the_best_is_saved_though_no_checkpoint_was_due(tmp_path: Path, cache_dir: Path, monkeypatch) -> None:
    taus = iter([1.2, 1.5, 1.4])
    real = loop.validate
    monkeypatch.setattr(loop, "validate", lambda *a, **k: {**real(*a, **k), "tau": next(taus)})
    settings = {"train__eval_every": 2, "train__keep_checkpoints": 1}
    run_ok(*train_arguments(cache_dir, tmp_path / "r", train__max_steps=6, **settings))
    assert checkpoint_names(tmp_path / "r") == ["step-000004", "step-000006"]


def test_early_stopping(tmp_path: Path, cache_dir: Path, monkeypatch) -> None:
    taus = iter([1.2, 1.5, 1.4, 1.45, 1.49])
    real = loop.validate
    monkeypatch.setattr(loop, "validate", lambda *a, **k: {**real(*a, **k), "tau": next(taus)})
    settings = {"train__eval_every": 2, "train__early_stopping_patience": 2}
    arguments = train_arguments(cache_dir, tmp_path / "r", train__max_steps=100, **settings)
    result = run_cli(*arguments)
    assert result.exit_code == 0
    assert "stopped early: 2 evaluations without a better held-out tau" in result.stderr
    progress = progress_of(tmp_path / "r")
    assert (progress["step"], progress["best"]) == (8, {"step": 4, "tau": 1.5})
    assert "complete" in run_ok(*arguments)
    assert progress_of(tmp_path / "r") == progress


def test_a_checkpoint_after_some_minutes(tmp_path: Path, cache_dir: Path) -> None:
    settings = {"train__checkpoint_minutes": 1e-6, "train__keep_checkpoints": 100}
    run_ok(*train_arguments(cache_dir, tmp_path / "r", train__max_steps=4, **settings))
    assert checkpoint_names(tmp_path / "r") == [f"step-{n:06d}" for n in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    "name", ["model.safetensors", "training.safetensors", "training.json", "config.json"]
)
def test_a_damaged_checkpoint_is_one_line(
    tmp_path: Path, cache_dir: Path, uninterrupted: Path, name: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run, symlinks=True)
    arguments = train_arguments(cache_dir, run, train__max_steps=90, **OFTEN)
    before = sorted(run.glob("checkpoints/*"))[-2]
    newest = (run / LATEST).resolve()
    path = newest / name
    whole = path.read_bytes()
    page = newest / "training.json"
    page.write_text(page.read_text().replace('"complete": true', '"complete": false'))
    for content in (whole[: len(whole) // 2], b"", b"junk" * 100):
        path.write_bytes(content)
        if name != "config.json":  # training makes that anew
            assert_refused(run_cli(*arguments), 1, str(newest), "damaged", "remove it")
        if name != "training.safetensors":
            evaluated = run_cli("evaluate", "--cache", cache_dir, "--run", run)
            assert_refused(evaluated, 1, str(newest), "damaged")
    shutil.rmtree(newest)
    assert f"continuing from step {int(before.name[5:])}" in run_cli(*arguments).stderr
    assert_same_run(run, uninterrupted)


def test_a_full_disk_costs_no_checkpoint(tmp_path: Path, cache_dir: Path, monkeypatch) -> None:
    import train.runs.checkpoint

    run = tmp_path / "run"
    arguments = train_arguments(cache_dir, run, train__max_steps=8, train__checkpoint_every=4)
    real, calls = train.runs.checkpoint.save_file, []

    def full(*given, **options):
        calls.append(given)
        if len(calls) == 4:  # the second file of the second checkpoint
            raise OSError(28, "No space left on device")
        real(*given, **options)

    monkeypatch.setattr(train.runs.checkpoint, "save_file", full)
    assert_refused(run_cli(*arguments), 1, "No space left on device", "the same command again")
    assert checkpoint_names(run) == ["step-000004"]
    run_ok(*arguments)
    run_ok(*train_arguments(cache_dir, tmp_path / "whole", train__max_steps=8, train__checkpoint_every=4))
    assert_same_run(run, tmp_path / "whole")


def test_random_generators_go_on_where_they_were(tmp_path: Path, cache_dir: Path) -> None:
    """Nothing in this draft draws while it trains; what somebody adds to it, may."""
    drawn = []

    class Drawing(loop.Training):
        def _step(self, step):
            drawn.append(torch.rand(()).item())
            if len(drawn) == 3:
                signal.raise_signal(signal.SIGTERM)
            return super()._step(step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Training", Drawing)
        arguments = train_arguments(cache_dir, tmp_path / "a", train__max_steps=6)
        assert run_cli(*arguments).exit_code == 143
        run_ok(*arguments)
        parts, drawn[:] = list(drawn), [0.0] * 10  # too many to be stopped again
        run_ok(*train_arguments(cache_dir, tmp_path / "b", train__max_steps=6))
    assert parts == drawn[10:]
    assert len(set(parts)) == 6


def test_nothing_in_a_checkpoint_is_pickled(uninterrupted: Path) -> None:
    names = {path.name for path in (uninterrupted / LATEST).iterdir()}
    assert names == {"config.json", "model.safetensors", "training.safetensors", "training.json"}
    assert weights_of(uninterrupted)


def test_muon_goes_on_exactly_too(tmp_path: Path, cache_dir: Path) -> None:
    settings = {"train__optimizer": "muon", "train__max_steps": 6, "train__checkpoint_every": 3}
    run_ok(*train_arguments(cache_dir, tmp_path / "whole", **settings))
    run = tmp_path / "run"
    run_ok(*train_arguments(cache_dir, run, **settings))
    shutil.rmtree(run / "checkpoints" / "step-000006")
    run_ok(*train_arguments(cache_dir, run, **settings))
    assert_same_run(run, tmp_path / "whole")
    adamw = tmp_path / "adamw"
    run_ok(*train_arguments(cache_dir, adamw, **{**settings, "train__optimizer": "adamw"}))
    ours, theirs = weights_of(run), weights_of(adamw)
    assert not torch.equal(ours["fc.weight"], theirs["fc.weight"])
    assert {name.split(".")[-1] for name in load_file(run / LATEST / "training.safetensors")} == {
        *("momentum_buffer", "exp_avg", "exp_avg_sq", "step", "cpu")
    }
