"""Settings that change while a run continues: what is allowed, what it does to the run, and its record."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path

import pytest
import torch

from tests.conftest import assert_refused, run_cli, run_ok
from tests.train.runs import checkpoint_names, lines_of, progress_of, train_arguments, weights_of
from train.runs.directory import load_run_config
from train.trainer import trainer as loop


def changes_of(run: Path) -> list[dict]:
    return json.loads((run / "run.json").read_text()).get("changes", [])


def stop_at(monkeypatch, count: int) -> None:
    """Let a signal stop the next training in its `count`-th step."""
    calls = []

    class Stopping(loop.Training):
        def _step(self, step):
            calls.append(step)
            if len(calls) == count:
                signal.raise_signal(signal.SIGTERM)
            return super()._step(step)

    monkeypatch.setattr(loop, "Training", Stopping)


def test_what_touches_no_trained_number_may_change(tmp_path: Path, cache_dir: Path, monkeypatch) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    run_ok(*train_arguments(cache_dir, whole, train__max_steps=8))
    stop_at(monkeypatch, 3)
    assert_refused(run_cli(*train_arguments(cache_dir, run, train__max_steps=8)), 143, "saved at step 3")
    settings = {
        "train__log_every": 1,
        "train__eval_every": 4,
        "train__checkpoint_every": 2,
        "train__keep_checkpoints": 9,
        "train__checkpoint_minutes": 0,
        "train__max_skipped_steps": 2,
        "train__early_stopping_patience": 5,
    }
    result = run_cli(*train_arguments(cache_dir, run, train__max_steps=8, **settings))
    assert result.exit_code == 0, result.output
    assert "settings changed from step 3 on (train.log_every: 5, now 1; " in result.stderr
    assert "schedule" not in result.stderr
    ours, theirs = weights_of(run), weights_of(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert progress_of(run)["evaluation"] == progress_of(whole)["evaluation"]
    assert [line["step"] for line in lines_of(run) if "lr" in line] == [4, 5, 6, 7, 8]
    assert [name for name in checkpoint_names(run) if name > "step-000003"] == [
        "step-000004",
        "step-000006",
        "step-000008",
    ]
    (change,) = changes_of(run)
    assert change["step"] == 3
    assert change["settings"] == {
        "train.log_every": [5, 1],
        "train.eval_every": [0, 4],
        "train.early_stopping_patience": [0, 5],
        "train.checkpoint_every": [0, 2],
        "train.checkpoint_minutes": [15.0, 0.0],
        "train.keep_checkpoints": [2, 9],
        "train.max_skipped_steps": [10, 2],
    }
    assert load_run_config(run).train.eval_every == 4
    assert changes_of(whole) == []


def rate(step: int, total: int) -> float:
    """Learning rate of a step from 0, by hand: 4% warm-up to 3e-3, then a cosine to a tenth."""
    warmup = math.ceil(0.04 * total)
    if step < warmup:
        return 3e-3 * (step + 1) / warmup
    share = (step - warmup) / (total - 1 - warmup)
    return 3e-3 * (0.1 + 0.9 * (1 + math.cos(math.pi * share)) / 2)


def test_a_complete_run_may_become_longer(tmp_path: Path, cache_dir: Path) -> None:
    run = tmp_path / "run"
    run_ok(*train_arguments(cache_dir, run, train__max_steps=6, train__log_every=1))
    result = run_cli(*train_arguments(cache_dir, run, train__max_steps=12, train__log_every=1))
    assert result.exit_code == 0, result.output
    assert "train.max_steps: 6, now 12), and the learning rate follows the longer schedule" in result.stderr
    logged = {line["step"]: line["lr"] for line in lines_of(run) if "lr" in line}
    wanted = [rate(step, 6 if step < 6 else 12) for step in range(12)]
    assert list(logged.values()) == pytest.approx(wanted, rel=1e-12)
    progress = progress_of(run)
    assert (progress["step"], progress["total_steps"], progress["complete"]) == (12, 12, True)
    assert changes_of(run) == [{"step": 6, "settings": {"train.max_steps": [6, 12]}}]
    shown = run_ok(*train_arguments(cache_dir, run, train__max_steps=12, train__log_every=1))
    assert "complete, nothing is left to train" in shown
    # A kill after the record and before the next checkpoint: the checkpoint's own config has the old length.
    result = run_cli(*train_arguments(cache_dir, run, train__max_steps=5, train__log_every=1))
    assert_refused(result, 1, "a run of 12 optimiser steps, 12 of them done", "one of 5", "--fresh")
    assert load_run_config(run).train.max_steps == 12


def test_a_longer_run_survives_a_kill_before_its_next_checkpoint(
    tmp_path: Path, cache_dir: Path, monkeypatch
) -> None:
    run = tmp_path / "run"
    run_ok(*train_arguments(cache_dir, run, train__max_steps=4))
    longer = train_arguments(cache_dir, run, train__max_steps=6)

    class Killed(loop.Training):
        def _step(self, step):
            raise SystemExit(9)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Training", Killed)
        assert run_cli(*longer).exit_code == 9
    assert progress_of(run)["complete"]
    run_ok(*longer)
    assert progress_of(run)["step"] == 6
    assert len(changes_of(run)) == 1


def test_more_epochs_are_a_longer_run(tmp_path: Path, cache_dir: Path) -> None:
    run = tmp_path / "run"
    settings = {"train__max_steps": "none", "train__micro_batches_per_step": 64}
    run_ok(*train_arguments(cache_dir, run, train__epochs=2, **settings))
    first = progress_of(run)["step"]
    run_ok(*train_arguments(cache_dir, run, train__epochs=3, **settings))
    assert (first, progress_of(run)["step"], progress_of(run)["epoch"]) == (2, 3, 2)
    result = run_cli(*train_arguments(cache_dir, run, train__epochs=1, **settings))
    assert_refused(result, 1, "a run of 3 optimiser steps", "one of 1")


def test_what_changes_the_numbers_is_refused_as_before(tmp_path: Path, cache_dir: Path) -> None:
    run = tmp_path / "run"
    run_ok(*train_arguments(cache_dir, run, train__max_steps=1))
    result = run_cli(*train_arguments(cache_dir, run, train__max_steps=2, train__eval_anchors=5))
    assert_refused(result, 1, "train.eval_anchors: 32 against 5", "train.max_steps: 1 against 2", "--fresh")
    assert changes_of(run) == []


def test_the_number_of_steps_is_said_with_its_reason(tmp_path: Path, cache_dir: Path) -> None:
    settings = {"train__max_steps": "none", "train__micro_batches_per_step": 8, "train__epochs": 2}
    result = run_cli(*train_arguments(cache_dir, tmp_path / "a", **settings))
    assert result.exit_code == 0, result.output
    steps = progress_of(tmp_path / "a")["total_steps"]
    (line,) = [text for text in result.stderr.splitlines() if "optimiser steps by" in text]
    assert line.startswith(f"{steps} optimiser steps by train.epochs = 2; an epoch is {steps // 2} step")
    assert "batches of at most 256 tokens, 8 per step" in line
    assert "warning: fewer than 100 optimiser steps" in result.stderr
    assert "lower train.micro_batches_per_step from 8 to 1" in result.stderr
    result = run_cli(*train_arguments(cache_dir, tmp_path / "b", train__max_steps=2))
    assert "2 optimiser steps by train.max_steps; an epoch is" in result.stderr
    assert "hardly learns: raise train.max_steps\n" in result.stderr


def test_a_hundred_steps_are_not_few(tmp_path: Path, cache_dir: Path, monkeypatch) -> None:
    stop_at(monkeypatch, 1)
    result = run_cli(*train_arguments(cache_dir, tmp_path / "a", train__max_steps=100))
    assert_refused(result, 143, "saved at step 1")
    assert "100 optimiser steps by train.max_steps" in result.stderr
    assert "few" not in result.stderr


def test_an_empty_held_out_set_names_the_share_that_works(tmp_path: Path, cache_dir: Path) -> None:
    result = run_cli(*train_arguments(cache_dir, tmp_path / "a", train__max_steps=1, train__held_out=0.0001))
    assert_refused(
        result, 2, "train.held_out = 0.0001 leaves no sample held out", "smallest share that works is "
    )
    share = result.stderr.rsplit("works is ", 1)[1].split()[0]
    run_ok(*train_arguments(cache_dir, tmp_path / "a", train__max_steps=1, train__held_out=share))
