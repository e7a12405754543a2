"""Findings of a tune: the table, the best config, and the figure to expect of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline import config as configuration
from pipeline import files
from pipeline.text import duration, table
from train.config import RunConfig
from train.experiments.tune.curve import LEAST_LENGTHS, LEVEL, Expected, Point, expect
from train.experiments.tune.search import Plan, best_trial
from train.experiments.tune.space import settings_of, trial_config
from train.experiments.tune.study import Run, Study, Trial

BEST_CONFIG, SUMMARY = "best.toml", "tune.json"
"""Files in the folder of the runs."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """Trials of a tune, and the best of them."""

    full_steps: int
    """Optimiser steps of the best config's run."""
    rungs: Sequence[int]
    trials: Sequence[Trial]
    settings: dict[int, tuple[str, ...]]
    """Settings of every trial, by its number."""
    best: Trial
    config: RunConfig
    """The base config with the best settings."""
    repeats: Sequence[Run]
    """Runs of the best settings with other seeds."""
    expected: Expected | None
    """Of the best settings in `full_steps` steps; None if the runs are too few to tell."""
    seconds: float
    budget: float


def collect(study: Study, plan: Plan, budget: float) -> Result | None:
    """Return what a study found; None before its first complete run.

    Args:
        budget: in seconds.
    """
    trials = study.trials()
    best = best_trial(trials)
    if best is None:
        return None
    settings = {t.number: settings_of(plan.space, t.parameters) if t.number else () for t in trials}
    repeats = study.repeats(best.number)
    points = [Point(trial.number, run.steps, run.tau) for trial in trials for run in trial.runs]
    points += [Point(best.number, run.steps, run.tau) for run in repeats]
    config = trial_config(plan.base, settings[best.number])[0]
    steps, slots = plan.lengths(config)
    return Result(
        full_steps=steps,
        rungs=study.rungs or [],
        trials=trials,
        settings=settings,
        best=best,
        config=config,
        repeats=repeats,
        expected=expect(points, best.number, steps, slots + 1),
        seconds=study.seconds,
        budget=budget,
    )


def write(result: Result, folder: Path) -> None:
    """Write the best config, and every figure as JSON."""
    header = "".join(f"# {line}\n" for line in _headlines(result))
    text = f"# Written by dspark tune.\n{header}\n{configuration.to_toml(result.config)}"
    files.publish_bytes(folder / BEST_CONFIG, text.encode())
    files.publish_bytes(folder / SUMMARY, (json.dumps(_values(result), indent=1) + "\n").encode())


def _values(result: Result) -> dict[str, Any]:
    best = result.best
    return {
        "seconds": result.seconds,
        "budget_seconds": result.budget,
        "full_steps": result.full_steps,
        "rungs": list(result.rungs),
        "best": {"trial": best.number, "repeats": [asdict(run) for run in result.repeats]},
        "expected": result.expected and {**asdict(result.expected), "level": LEVEL},
        "trials": [
            {
                "trial": trial.number,
                "state": trial.state,
                "settings": list(result.settings[trial.number]),
                "runs": [asdict(run) for run in trial.runs],
                "problem": trial.problem,
            }
            for trial in result.trials
        ],
    }


def _headlines(result: Result) -> list[str]:
    """Return what was measured of the best settings, and what is expected of them, a line each."""
    best = result.best
    last, others = best.runs[-1], [t for t in result.trials if t.runs]
    lines = [
        f"Best of {len(others)} trials in {duration(result.seconds)}: trial {best.number}, "
        f"{', '.join(result.settings[best.number]) or 'the config as it was given'}.",
        f"Held-out tau {last.tau:.3f} after {last.steps} steps, seed {last.seed}. It was chosen for this "
        "figure, which is likely too high.",
    ]
    for run in result.repeats:
        if run.steps == last.steps:
            lines.append(f"Held-out tau {run.tau:.3f} after {run.steps} steps, seed {run.seed}.")
    base = next((t for t in result.trials if t.number == 0 and best.number), None)
    same = [run for run in base.runs if run.steps == last.steps] if base else []
    lines += [f"The config as it was given: {run.tau:.3f} after {run.steps} steps." for run in same]
    return [*lines, *_ahead(result), *_expectation(result)]


def _ahead(result: Result) -> list[str]:
    """Name the waiting trials that were ahead of the best one where both were measured."""
    reached = {run.steps: run.tau for run in result.best.runs}
    lines = []
    for trial in result.trials:
        last = trial.runs[-1] if trial.state == "waiting" and trial.runs else None
        if last is not None and last.tau > reached.get(last.steps, last.tau):
            lines.append(
                f"Trial {trial.number} was ahead of it at {last.steps} steps ({last.tau:.3f} against "
                f"{reached[last.steps]:.3f}), and the search ended before its next run."
            )
    return lines


def _expectation(result: Result) -> list[str]:
    found, steps = result.expected, result.full_steps
    if found is None:
        lengths = len({run.steps for trial in result.trials for run in trial.runs})
        return [
            f"Nothing can be said of {steps} steps: a curve needs runs of {LEAST_LENGTHS} lengths, of "
            f"several trials, and there are {lengths}. Raise --budget."
        ]
    interval = "the runs are too few for an interval"
    if found.low is not None and found.high is not None:
        interval = f"{LEVEL:.0%} interval {found.low:.3f} to {found.high:.3f} for one more run"
    if found.curve is None:
        how = f"the mean of {found.runs} run{'s' * (found.runs != 1)} of that length"
    else:
        curve = found.curve
        shape = f"{curve.a:.3f} - {curve.b:.3f} * steps ** -{curve.c:.3f}"
        how = f"by the curve {shape}, fitted to {found.runs} runs"
    return [
        f"Expected held-out tau after {steps} steps: {found.tau:.3f} ({interval}; {how}).",
        "The interval is about the training's chance on these held-out samples, not about other data.",
    ][: 1 if found.low is None else 2]


def describe(result: Result) -> list[str]:
    """Return the table of trials and the findings, a line each. The best trial is marked with a star."""
    keys = list(dict.fromkeys(_key(s) for own in result.settings.values() for s in own))
    titles = ["trial", *keys, *(f"tau at {steps}" for steps in result.rungs), "s/step", "state"]
    rows = [titles]
    for trial in result.trials:
        own = {_key(s): s.partition("=")[2] for s in result.settings[trial.number]}
        given = "" if trial.number else "as given"
        taus = {run.steps: f"{run.tau:.3f}" for run in trial.runs}
        rate = f"{trial.runs[-1].seconds / trial.runs[-1].steps:.3g}" if trial.runs else ""
        star = "*" if trial.number == result.best.number else " "
        rows.append(
            [
                f"{trial.number}{star}",
                *(own.get(key, given) for key in keys),
                *(taus.get(steps, "") for steps in result.rungs),
                rate,
                trial.state,
            ]
        )
    lines = [*table(rows, left={len(titles) - 1}), "* the best", "", *_headlines(result)]
    waiting = [t.number for t in result.trials if t.state == "waiting"]
    if waiting:
        numbers = ", ".join(map(str, waiting))
        lines.append(f"Not at their end: trials {numbers}. A larger --budget continues them.")
    return lines


def _key(setting: str) -> str:
    return setting.partition("=")[0]
