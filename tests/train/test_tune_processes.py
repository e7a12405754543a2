"""`dspark tune` in a process of its own, killed and stopped; and one with the real `dspark train`."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from tests.conftest import run_ok
from tests.processes import Dspark
from tests.train.test_sweep import CONFIG
from tests.train.tunes import by_stand_in

LENGTHS = ("--shortest", "20", "--longest", "60", "--repeats", "0")


class Tune:
    """A command of two trials, by the stand-in."""

    def __init__(self, folder: Path, cache: Path):
        self.folder, self.runs = folder, folder / "runs"
        (folder / "base.toml").write_text(CONFIG.replace("max_steps = 4", "max_steps = 60"))
        where = ["--cache", cache, "--config", folder / "base.toml", "--runs", self.runs, "--device", "cpu"]
        more = ["--budget", "1h", "--trials", "2", "--search", "train.lr=1e-4..1e-1", *LENGTHS]
        self.arguments = ["tune", *where, *more]

    def start(self, name: str, **variables: str) -> Dspark:
        return Dspark(self.folder / name, *self.arguments, before=by_stand_in, **variables)

    def halted(self, run: str, name: str = "first") -> Dspark:
        """Return one whose run of that name stands at half of its steps."""
        (self.runs / "halted").unlink(missing_ok=True)
        tune = self.start(name, HALT=run)
        assert tune.wait_until((self.runs / "halted").exists)
        return tune

    def started(self) -> list[tuple[str, int]]:
        """Name of each run and the step that it began at."""
        return [(name, step) for name, step, _ in self.lines()]

    def lines(self) -> list[list]:
        return [json.loads(line) for line in (self.runs / "started").read_text().splitlines()]

    def check_result(self) -> None:
        """Both trials are there, once, with each of their runs once."""
        trials = json.loads((self.runs / "tune.json").read_text())["trials"]
        assert [trial["trial"] for trial in trials] == [0, 1]
        assert [run["steps"] for run in trials[0]["runs"]] == [20, 60]
        assert all(trial["state"] in ("complete", "pruned") for trial in trials)


@pytest.fixture
def tune(tmp_path: Path, cache_dir: Path) -> Tune:
    return Tune(tmp_path, cache_dir)


def test_stopped_and_killed_in_runs_it_continues_from_their_checkpoints(tune: Tune) -> None:
    first = tune.halted("trial-000-20")
    first.send(signal.SIGTERM)
    assert first.wait() == 128 + signal.SIGTERM
    (line,) = first.errors
    assert "stopped by SIGTERM" in line
    assert "the same command continues" in line
    assert "trial 0: stopped; its checkpoint is kept" in first.out
    second = tune.halted("trial-000-60", "second")
    second.send(signal.SIGKILL)
    assert second.wait() == -signal.SIGKILL
    os.kill(tune.lines()[-1][2], signal.SIGKILL)  # the run dies too, as in a power cut
    third = tune.start("third")
    assert third.wait() == 0, third.err
    assert "continuing: 1 trials" in third.out
    names = [("trial-000-20", 0), ("trial-000-20", 10), ("trial-000-60", 0), ("trial-000-60", 30)]
    assert tune.started()[:4] == names
    tune.check_result()


def test_a_run_that_a_killed_tune_left_at_work_is_waited_for(tune: Tune) -> None:
    first = tune.halted("trial-000-20")
    first.send(signal.SIGKILL)
    first.wait()
    second, waits = tune.start("second"), "a process of an earlier session is training it"
    out = second.folder / "out"
    assert second.wait_until(lambda: out.exists() and waits in out.read_text())
    assert len(tune.started()) == 1
    (tune.runs / "go").touch()
    assert second.wait() == 0, second.err
    assert tune.started()[:3] == [("trial-000-20", 0), ("trial-000-20", 20), ("trial-000-60", 0)]
    tune.check_result()


def test_a_real_run_and_the_best_config_trains(tmp_path: Path, cache_dir: Path) -> None:
    (tmp_path / "base.toml").write_text(CONFIG)
    where = ["--cache", cache_dir, "--config", tmp_path / "base.toml", "--runs", tmp_path / "runs"]
    more = ["--trials", "1", "--shortest", "4", "--repeats", "0", "--set", "train.precision=fp32"]
    out = run_ok("tune", *where, "--device", "cpu", "--budget", "10m", *more)
    found = json.loads((tmp_path / "runs" / "tune.json").read_text())
    (measured,) = found["trials"][0]["runs"]
    best = ["--cache", cache_dir, "--config", tmp_path / "runs" / "best.toml", "--run", tmp_path / "best"]
    trained = run_ok("train", *best, "--device", "cpu")
    assert f"held-out tau {measured['tau']:.3f}" in trained  # the same settings, the same draft
    assert f"held-out tau {measured['tau']:.3f} after 4 steps" in out.lower()
