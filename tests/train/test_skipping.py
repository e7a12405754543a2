"""Steps whose loss or gradient is not finite: skipped, counted, and the end of a run that has too many."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

from pipeline.cache import CacheReader
from tests.conftest import assert_refused, run_cli, run_ok
from tests.processes import start_ranks
from tests.train.runs import figures_of, lines_of, progress_of, train_arguments, weights_of
from train.data.packing import epoch_packs
from train.data.split import split
from train.trainer import trainer as loop


@pytest.fixture
def poisoned(monkeypatch):
    """Let the loss of some optimiser steps be NaN: `poisoned(4, 5)`."""

    def poison(*steps: int, part: str = "loss") -> None:
        class Poisoned(loop.Training):
            def _step(self, step):
                real, number = self.spread, self.progress.step + 1

                class Spread:
                    def micro_batch(self, *, last):
                        return real.micro_batch(last=last)

                    def __call__(self, **batch):
                        metrics = real(**batch)
                        if number in steps and part == "loss":
                            metrics.loss = metrics.loss * float("nan")
                            metrics.sums.terms["ce"] = metrics.sums.terms["ce"] * float("nan")
                        elif number in steps:  # the loss is fine, its gradient is not
                            metrics.loss.register_hook(lambda gradient: gradient * float("inf"))
                        return metrics

                self.spread = Spread()
                try:
                    return super()._step(step)
                finally:
                    self.spread = real

        monkeypatch.setattr(loop, "Training", Poisoned)

    return poison


@pytest.mark.parametrize("part", ["loss", "gradient"])
def test_a_step_is_skipped_and_counted(tmp_path: Path, cache_dir: Path, poisoned, part: str) -> None:
    poisoned(4, 5, part=part)
    settings = {"train__log_every": 1, "train__checkpoint_every": 1, "train__keep_checkpoints": 9}
    run = tmp_path / "r"
    run_ok(*train_arguments(cache_dir, run, train__max_steps=7, **settings))
    # The steps are taken and lost: weights are what they were, the schedule goes on.
    before, after = (weights_of(run, f"checkpoints/step-{n:06d}") for n in (3, 5))
    assert all(torch.equal(before[name], after[name]) for name in before)
    logged = {line["step"]: line for line in lines_of(run) if "lr" in line}
    assert [logged[n]["skipped_steps"] for n in range(1, 8)] == [0, 0, 0, 1, 1, 0, 0]
    assert logged[4]["loss"] is None
    assert logged[6]["loss"] > 0
    assert logged[5]["lr"] > logged[6]["lr"] > logged[7]["lr"]
    progress = progress_of(run)
    assert (progress["skipped_steps"], progress["skipped_in_a_row"]) == (2, 0)
    assert all(torch.isfinite(weight).all() for weight in weights_of(run).values())
    # Which samples: those of the step's pack.
    reader = CacheReader(cache_dir)
    samples, _ = split(reader, 0.2)
    packs = epoch_packs(reader.lengths[samples], 256, 0, 0)
    skipped = {line["step"]: line["skipped"]["samples"] for line in lines_of(run) if "skipped" in line}
    assert skipped == {
        n: [reader.sample_ids[samples[i]].tobytes().hex() for i in packs[n - 1]] for n in (4, 5)
    }


def test_too_many_in_a_row_end_the_run(tmp_path: Path, cache_dir: Path, poisoned) -> None:
    poisoned(2, 4, 5, 6)
    run = tmp_path / "r"
    settings = {"train__max_skipped_steps": 3, "train__checkpoint_every": 3}
    result = run_cli(*train_arguments(cache_dir, run, train__max_steps=9, **settings))
    ids = [line["skipped"]["samples"] for line in lines_of(run) if "skipped" in line][-1]
    assert_refused(result, 1, "step 6", "loss was not finite, 3 steps in a row", ids[0], "train.lr")
    assert f"dspark inspect {cache_dir} --sample ID" in result.stderr
    shown = run_cli("inspect", cache_dir, "--sample", ids[0])
    assert shown.exit_code == 0, shown.output
    assert progress_of(run)["step"] == 3


def test_what_was_skipped_is_remembered_over_a_stop(tmp_path: Path, cache_dir: Path, poisoned) -> None:
    poisoned(2, 3, 5)
    settings = {"train__max_steps": 8, "train__log_every": 4}
    run_ok(*train_arguments(cache_dir, tmp_path / "whole", **settings))
    base, calls = loop.Training, []

    class Stopping(base):
        def _step(self, step):
            calls.append(step)
            if len(calls) == 3:
                signal.raise_signal(signal.SIGTERM)
            return super()._step(step)

    loop.Training = Stopping  # the fixture puts the real one back
    arguments = train_arguments(cache_dir, tmp_path / "r", **settings)
    assert_refused(run_cli(*arguments), 143, "step 3")
    assert progress_of(tmp_path / "r")["skipped_in_a_row"] == 2
    run_ok(*arguments)
    assert figures_of(tmp_path / "r") == figures_of(tmp_path / "whole")
    assert progress_of(tmp_path / "r")["skipped_steps"] == 3


def test_a_rank_whose_loss_is_not_finite_skips_all(tmp_path: Path, cache_dir: Path, monkeypatch) -> None:
    """States of the cache that overflow: every rank skips, and the guilty batch is named, whoever had it."""
    run = tmp_path / "r"
    settings = {"train__micro_batches_per_step": 2, "train__max_skipped_steps": 2, "train__lr": 1e30}
    settings |= {"train__max_grad_norm": 1e30, "train__log_every": 1, "train__max_steps": 50}
    ranks = start_ranks(tmp_path / "out", 2, *train_arguments(cache_dir, run, **settings))
    assert [process.wait() for process in ranks] == [1, 1]
    (line,) = ranks[0].errors
    assert "not finite, 2 steps in a row. Samples of the last batch: " in line
    assert ranks[1].errors == []
    skipped = [
        json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines() if "samples" in row
    ]
    assert len(skipped) >= 2


@pytest.fixture
def overflowing(monkeypatch):
    """Let weights become infinite, or `value`, after a step, as an optimiser's overflow leaves them."""

    def overflow(at: int, value: float = float("inf")) -> None:
        class Overflowing(loop.Training):
            def _step(self, step):
                due = super()._step(step)
                if self.progress.step == at:
                    with torch.no_grad():
                        next(iter(self.model.fc.parameters())).fill_(value)
                return due

        monkeypatch.setattr(loop, "Training", Overflowing)

    return overflow


@pytest.mark.parametrize("held_out", [0.2, 0])
@pytest.mark.parametrize("step", [4, 6])
def test_a_draft_that_is_not_finite_is_never_saved(
    tmp_path: Path, cache_dir: Path, overflowing, held_out: float, step: int
) -> None:
    """Neither on the way nor at the end; what was saved before stays the newest and the best."""
    overflowing(step)
    run = tmp_path / "r"
    settings = {"train__max_steps": 6, "train__checkpoint_every": 2, "train__keep_checkpoints": 9}
    settings |= {"train__eval_every": 2 if held_out else 0, "train__held_out": held_out}
    result = run_cli(*train_arguments(cache_dir, run, **settings))
    last = f"step-{step - 2:06d}"
    assert_refused(result, 1, f"step {step}: ", "not finite", f"{run} keeps {last}", "train.lr")
    assert (run / "latest").resolve().name == last
    assert not (run / "checkpoints" / f"step-{step:06d}").exists()
    assert not progress_of(run)["complete"]
    for name in ("latest", *(["best"] if held_out else [])):
        assert all(torch.isfinite(weight).all() for weight in weights_of(run, name).values())
    (row,) = json.loads(run_ok("compare", run, "--format", "json"))
    assert (row["step"], row["complete"]) == (step - 2, False)


def test_without_a_checkpoint_nothing_is_there_to_use(tmp_path: Path, cache_dir: Path, overflowing) -> None:
    overflowing(2)
    run = tmp_path / "r"
    result = run_cli(*train_arguments(cache_dir, run, train__max_steps=2, train__held_out=0))
    assert_refused(result, 1, "step 2: ", "is not finite", f"{run} has no checkpoint")
    assert_refused(run_cli("export", run, tmp_path / "e", "--to", "hf"), 1, "no finished checkpoint")
    assert_refused(run_cli("evaluate", "--cache", cache_dir, "--run", run), 1, "no finished checkpoint")


@pytest.mark.parametrize("held_out", [0.2, 0])
def test_a_run_that_ends_in_skipped_steps(tmp_path: Path, cache_dir: Path, poisoned, held_out: float) -> None:
    """A bad batch at the end costs its step, not the run: the draft is that of the steps before."""
    poisoned(3, 4)
    settings = {"train__held_out": held_out, "train__checkpoint_every": 2, "train__keep_checkpoints": 9}
    run_ok(*train_arguments(cache_dir, tmp_path / "r", train__max_steps=4, **settings))
    assert progress_of(tmp_path / "r")["complete"]
    before, last = (weights_of(tmp_path / "r", f"checkpoints/step-{step:06d}") for step in (2, 4))
    assert before.keys() == last.keys()
    assert all(torch.equal(weight, last[name]) for name, weight in before.items())


@pytest.mark.parametrize("held_out", [0.2, 0])
def test_finite_weights_whose_losses_are_not_are_no_draft(
    tmp_path: Path, cache_dir: Path, overflowing, held_out: float
) -> None:
    overflowing(3, 3e38)
    run = tmp_path / "r"
    settings = {"train__held_out": held_out, "train__checkpoint_every": 2}
    result = run_cli(*train_arguments(cache_dir, run, train__max_steps=4, **settings))
    what = "held-out loss" if held_out else "loss of most training samples"
    assert_refused(result, 1, f"step 4: the {what} is not finite", f"{run} keeps step-000002")
    assert not progress_of(run)["complete"]
