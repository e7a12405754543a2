"""Stand-in for `dspark train` in tests of tunes: leaves behind what a run does, without torch.

As a script it takes train's own arguments. tests/train/test_tune.py also uses it in its own process.
"""

from __future__ import annotations

import dataclasses
import fcntl
import itertools
import json
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline import config as configuration
from train.config import RunConfig
from train.draft.settings import run_config
from train.runs.state import Progress

B, C = 0.8, 0.5
"""Of the stand-in's learning curves, which all have this shape."""


def limit(config: RunConfig) -> float:
    """Return what a draft reaches in the end: best at a rate of 1e-2, and the better the higher its rank."""
    return 1.7 - 0.1 * math.log10(config.train.lr / 1e-2) ** 2 + config.draft.markov_rank / 1000


def tau_of(config: RunConfig, steps: int) -> float:
    """Return the held-out tau after a run of so many steps; seeds differ a little."""
    return limit(config) - B * steps**-C + 0.004 * ((config.train.seed * 7 + steps) % 3 - 1)


def wanted(file: Path, settings: Sequence[str]) -> RunConfig:
    return run_config(configuration.apply_overrides(configuration.load_toml(file), settings))


def step_of(run: Path) -> int:
    """Return the step of a run's newest checkpoint."""
    names = sorted(path.name for path in run.glob("checkpoints/step-*"))
    return int(names[-1].removeprefix("step-")) if names else 0


def save(run: Path, config: RunConfig, cache: Path, step: int) -> None:
    """Write a checkpoint as `dspark train` does, with an evaluation at the last step."""
    total = config.train.max_steps or 0
    folder = run / "checkpoints" / f"step-{step:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    identity = json.loads((cache / "manifest.json").read_text())["identity"]
    (run / "run.json").write_text(json.dumps({"version": {}, "cache": identity}))
    (run / "config.toml").write_text(configuration.to_toml(config))
    (folder / "model.safetensors").write_text("weights")
    (folder / "training.safetensors").write_text("states")
    evaluation = None
    if step == total:
        evaluation = {"step": step, "tau": tau_of(config, total), "accept_by_position": [0.5], "loss": 1.0}
    progress = Progress(
        total_steps=total,
        parameters=9,
        step=step,
        evaluation=evaluation,
        complete=step == total,
        seconds=float(step),
    )
    about = {"config": {}, "cache": identity, "version": {}, "machine": {}}
    (folder / "training.json").write_text(json.dumps({"progress": dataclasses.asdict(progress), **about}))


def stand_in(given: list[str]) -> None:
    """Train a run; the one that $HALT names stops halfway until a file `go` is beside the runs."""

    def options(name: str) -> list[str]:
        return [value for option, value in itertools.pairwise(given) if option == name]

    (run,), (cache,), (file,) = (map(Path, options(name)) for name in ("--run", "--cache", "--config"))
    config = wanted(file, options("--set"))
    run.mkdir(parents=True, exist_ok=True)
    lock = (run / ".lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit("error: another process is training it")
    total, start = config.train.max_steps or 0, step_of(run)
    with (run.parent / "started").open("a") as lines:
        lines.write(json.dumps([run.name, start, os.getpid()]) + "\n")
    if run.name == os.environ.get("HALT") and start < total // 2:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        save(run, config, cache, total // 2)
        (run.parent / "halted").touch()
        deadline = time.monotonic() + 20
        while not (run.parent / "go").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
    save(run, config, cache, total)


def by_stand_in() -> None:
    """Let the processes of a tune be this file."""
    from train.experiments import processes

    real = processes.train_command
    processes.train_command = lambda *given: [sys.executable, __file__, *real(*given)[4:]]


if __name__ == "__main__":
    stand_in(sys.argv[1:])
