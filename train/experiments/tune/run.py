"""A tune from its request to its result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from pipeline import config as configuration
from pipeline import files
from pipeline.cache.optional import plain_values
from pipeline.errors import ConfigError, DSparkError, RunError, UsageError
from pipeline.remote.address import Place
from pipeline.signals import stop_on_signals
from pipeline.text import duration
from train.config import RunConfig
from train.draft.settings import run_config
from train.experiments.compare import flat_values
from train.experiments.processes import Processes, visible_gpus
from train.experiments.tune.budget import Clock
from train.experiments.tune.result import BEST_CONFIG, collect, describe, write
from train.experiments.tune.search import Plan, Search, ladder
from train.experiments.tune.space import Searched, default_space, parse_space, trial_config
from train.experiments.tune.study import Study, database_errors, require_optuna
from train.runs.changes import flat_settings
from train.runs.directory import locked
from train.trainer.setup import Setup, count_run_steps, set_up

_BASE = "base.toml"


def tune(
    cache: Place,
    config_file: Path,
    folder: Path,
    budget: float,
    *,
    settings: Sequence[str] = (),
    search: Sequence[str] = (),
    shortest: int | None = None,
    longest: int | None = None,
    most_trials: int | None = None,
    repeats: int = 1,
    seed: int = 0,
    jobs: int | None = None,
    device: str = "auto",
    say: Callable[[str], object] = print,
) -> None:
    """Search the settings of a run by successive halving, and write the best config.

    Writes to `folder`: tune.db, optuna's study; a directory and a log per run; `best.toml`; `tune.json`.

    Args:
        config_file: the config that trials differ from; it is the first trial.
        folder: of the runs, new or of the same tune.
        budget: seconds of all sessions in this folder.
        settings: `table.key=value`, of every trial.
        search: `table.key=low..high` or `table.key=value,value,...`; by default those of the kind of draft.
        shortest: optimiser steps of the shortest runs.
        longest: optimiser steps of the longest runs, whatever the budget.
        most_trials: trials of all sessions at most.
        repeats: runs of the best settings with other seeds, at the end.
        seed: of the search. All runs have the config's own train.seed.
        jobs: runs trained at once. The default is one per GPU, and one without a GPU.
        say: gets lines for the user.

    Raises:
        DSparkError: as of `sweep`; the request can't be searched; or the folder has another tune.
        StoppedError: a signal came. What was measured is kept and shown.
    """
    require_optuna()
    values = configuration.apply_overrides(configuration.load_toml(config_file), settings)
    base = run_config(values, str(config_file))
    setup = _set_up(cache, base)
    _check_comparable(setup)

    def lengths(config: RunConfig) -> tuple[int, int]:
        setup = _set_up(cache, config)
        return count_run_steps(setup), setup.kind.slots(setup.shape)

    steps = count_run_steps(setup)
    _check_lengths(steps, shortest, longest)
    plan = Plan(
        base=base,
        space=_space(cache, base, search, say),
        file=folder / _BASE,
        steps=steps,
        lengths=lengths,
        ladder=ladder(steps, shortest, longest),
        whole_ladder=longest is not None,
        most_trials=most_trials,
        repeats=repeats,
    )
    request = {
        **flat_values("cache", plain_values(setup.reader.manifest.identity)),
        **flat_settings(setup.config),
        "--search": [f"{each.key}={each.text}" for each in plan.space],
        "--seed": seed,
        "--shortest": shortest,
        "--longest": longest,
    }
    gpus = visible_gpus() if device in ("auto", "cuda") else []
    jobs = jobs or max(1, len(gpus))
    with locked(folder, work="tuning in", option="--runs"):
        study = Study(folder, request, seed, plan.ladder[0])
        if not plan.file.exists():  # also if a tune was killed before it wrote it
            files.publish_bytes(plan.file, configuration.to_toml(base).encode())
        processes = Processes(cache=cache, runs=folder, device=device, gpus=gpus, jobs=jobs)
        _work(Search(plan=plan, study=study, clock=Clock(study, budget), processes=processes, say=say))


def _work(search: Search) -> None:
    """Search, write the result and show it."""
    folder, plan, study, say = search.processes.runs, search.plan, search.study, search.say
    say("\n".join(_introduction(search)))
    with stop_on_signals() as stop:
        try:
            # After an error here, or a second signal, no run continues unattended.
            with database_errors(study.path), search.processes:
                search.run(stop)
        finally:
            result = collect(study, plan, search.clock.budget)
            if result is not None:
                write(result, folder)
        stop.check(f"{folder} keeps what was measured, the same command continues")
    if result is None:
        failed = [trial.problem for trial in study.trials() if trial.problem]
        if failed:
            raise RunError(f"no trial succeeded, {len(failed)} failed, the last one with: {failed[-1]}")
        raise RunError(
            f"no run of {plan.ladder[0]} steps ended within the budget of {duration(search.clock.budget)}: "
            "raise --budget, which continues, or lower --shortest in another --runs"
        )
    say("\n" + "\n".join(describe(result)))
    say(f"written: {folder / BEST_CONFIG}")


def _set_up(cache: Place, config: RunConfig) -> Setup:
    """Check a config against the cache as `dspark train` does."""
    # sdpa runs everywhere, so no device is needed here: the GPUs are for the runs.
    return set_up(cache, replace(config, draft=replace(config.draft, attention="sdpa")), torch.device("cpu"))


def _check_comparable(setup: Setup) -> None:
    """Check that runs can be compared by their held-out tau."""
    if not len(setup.held_out):
        raise ConfigError("trials are compared by their held-out tau: set train.held_out above 0")
    if not setup.reader.has_last_hidden:
        raise UsageError(
            "trials are compared by their held-out tau, which a cache without last hidden states can't tell: "
            "capture one with them"
        )


def _check_lengths(steps: int, shortest: int | None, longest: int | None) -> None:
    """Check that the lengths of runs fit each other and the config's."""
    if longest is not None and longest > steps:
        raise UsageError(f"--longest {longest} is more than the config's {steps} optimiser steps: lower it")
    if shortest is not None and shortest > (longest or steps):
        raise UsageError(
            f"--shortest {shortest} is more than the longest runs' {longest or steps} steps: lower it"
        )


def _space(
    cache: Place, base: RunConfig, search: Sequence[str], say: Callable[[str], object]
) -> list[Searched]:
    """Return what is searched. A default that this cache has no use for is left out with a line.

    Raises:
        DSparkError: a run can't have an end of a range, or a choice, that the user gave.
    """
    space = parse_space(search, base) if search else default_space(base)
    kept = []
    for searched in space:
        setting = ""
        try:
            for setting in searched.ends():
                _set_up(cache, trial_config(base, [setting])[0])
        except DSparkError as error:
            if search:
                raise type(error)(f"--search {searched.key}={searched.text}: {setting}: {error}") from None
            say(f"not searched: {setting}: {error}")
        else:
            kept.append(searched)
    if not kept:
        raise UsageError("there is nothing to search: give --search a setting")
    return kept


def _introduction(search: Search) -> list[str]:
    study, clock = search.study, search.clock
    lines = [f"search: {', '.join(f'{each.key}={each.text}' for each in search.plan.space)}"]
    if study.new:
        return [*lines, f"study: {study.path} (optuna-dashboard sqlite:///{study.path})"]
    spent = f"{duration(clock.spent)} of {duration(clock.budget)} are spent"
    return [*lines, f"continuing: {len(study.trials())} trials, {spent}"]
