"""The search of a tune: trials climb rungs, each a complete run of its own, until the budget is spent."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.errors import ConfigError, DSparkError, RunError
from pipeline.signals import StopRequest
from pipeline.text import duration
from train.config import RunConfig
from train.experiments.grid import Point
from train.experiments.processes import Child, Processes
from train.experiments.tune.budget import Clock, expected_seconds
from train.experiments.tune.space import Searched, base_parameters, settings_of, trial_config
from train.experiments.tune.study import FACTOR, Run, Study, Trial
from train.runs.checkpoint import drop_weights
from train.runs.directory import in_use, read_progress

if TYPE_CHECKING:
    import optuna

POLL_SECONDS = 0.1
SHARE = 6
"""A run of the last rung takes at most this part of the budget."""
_FEWEST_STEPS = 20
_MOST_FAILURES = 3
_MOST_SAME = 50
"""Draws in a row of settings that were tried before, after which there are none left to try."""
_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def ladder(total: int, shortest: int | None, longest: int | None) -> list[int]:
    """Return lengths of runs in optimiser steps, each `FACTOR` times the one before, but for the last.

    Args:
        total: steps of the base config's run.
        shortest: the first length; None for a 27th of the last, but 20 steps at least.
        longest: the last length; None for `total`.
    """
    last = longest or total
    first = shortest or min(last, max(_FEWEST_STEPS, math.ceil(last / FACTOR**3)))
    steps, rungs = first, []
    while steps * FACTOR**0.5 <= last:  # one of nearly the last length would tell nothing new
        rungs.append(steps)
        steps *= FACTOR
    return [*rungs, last]


def best_trial(trials: Iterable[Trial]) -> Trial | None:
    """Return the trial with the best figure of those that climbed highest; None before the first run."""
    climbed = [trial for trial in trials if trial.runs and trial.state != "failed"]
    return max(climbed, key=lambda t: (len(t.runs), t.runs[-1].tau, -t.number), default=None)


@dataclass(kw_only=True)
class Plan:
    """Fixed facts of a tune."""

    base: RunConfig
    space: Sequence[Searched]
    file: Path
    """The base config, for the runs."""
    steps: int
    """Optimiser steps of the base config's run."""
    lengths: Callable[[RunConfig], tuple[int, int]]
    """Function that returns the optimiser steps and the slots K of a config's run."""
    ladder: Sequence[int]
    """Lengths of runs; a budget that is too small for the last ones leaves them out."""
    whole_ladder: bool
    """Use all of them, whatever the budget."""
    most_trials: int | None
    repeats: int
    """Runs of the best settings with other seeds."""


@dataclass(kw_only=True)
class _Work:
    """A run to train next."""

    number: int
    settings: tuple[str, ...]
    steps: int
    seed: int
    trial: optuna.trial.Trial | None
    """None for a repeat."""
    continued: bool = False

    @property
    def name(self) -> str:
        """Name of the run's directory."""
        name = f"trial-{self.number:03d}-{self.steps}"
        return name if self.trial is not None else f"{name}-seed-{self.seed}"

    @property
    def title(self) -> str:
        """Name of the run for people."""
        return f"trial {self.number}" if self.trial is not None else f"trial {self.number}, seed {self.seed}"


@dataclass(kw_only=True)
class Search:
    """The trials of a tune at work."""

    plan: Plan
    study: Study
    clock: Clock
    processes: Processes
    say: Callable[[str], object]
    waiting: list[_Work] = field(default_factory=list)
    """Runs to train before a new trial begins."""
    _at_work: dict[str, _Work] = field(default_factory=dict)
    _known: dict[tuple[str, ...], int] = field(default_factory=dict)
    _failures: int = 0
    _searching: bool = True
    _told: set[str] = field(default_factory=set)
    _dropped: set[str] = field(default_factory=set)

    def run(self, stop: StopRequest) -> None:
        """Search until the budget is spent or a signal came, then repeat the best.

        Raises:
            RunError: trials fail one after the other, or something else stopped a run.
        """
        for trial in self.study.trials():
            self._known[self._settings(trial)] = trial.number
            if trial.state == "waiting":
                self._reopen(trial)
        self._train(stop)
        self._searching = False
        if stop.signal is None:
            self.waiting = self._repeats()
            self._train(stop)
            for work in self.waiting:
                if not (self.processes.runs / work.name).is_dir():
                    self.say(f"{work.title}: not trained, there is no time left for it")

    def _settings(self, trial: Trial) -> tuple[str, ...]:
        return settings_of(self.plan.space, trial.parameters)

    def _reopen(self, trial: Trial) -> None:
        """Continue a trial that an earlier session has begun."""
        drawn = self.study.reopen(trial)
        work = self._work(drawn, len(trial.runs))
        if trial.runs:
            self._settle(work, list(trial.runs))
        else:
            self.waiting.append(work)

    def _train(self, stop: StopRequest) -> None:
        while True:
            for child in self.processes.ended():
                self._end(child, stop)
            over = stop.signal is not None or self.clock.left <= 0
            if over:
                self.processes.pass_on(stop.signal or signal.SIGTERM)
            elif self._fill():
                continue
            if not self.processes.at_work and (over or not self._unattended()):
                self.clock.note(at_once=True)
                return
            self.clock.note()
            time.sleep(POLL_SECONDS)

    def _fill(self) -> bool:
        """Begin a run where there is room for one. Return whether one has begun."""
        if len(self.processes.at_work) + len(self._unattended()) >= self.processes.jobs:
            return False
        for work in self.waiting:
            if self._expected(self._steps_left(work)) <= self.clock.left and work not in self._unattended():
                self.waiting.remove(work)
                self._begin(work)
                return True
        if not self._searching:
            return False
        reserved = self.plan.repeats * self._expected((self.study.rungs or self.plan.ladder[:1])[-1])
        if self._expected(self.plan.ladder[0]) > self.clock.left - reserved:
            return False
        new = self._new()
        if new is not None:
            self._begin(new)
        return new is not None

    def _unattended(self) -> list[_Work]:
        """Return the waiting runs that a process of a killed session still trains."""
        found = [work for work in self.waiting if in_use(self.processes.runs / work.name)]
        for work in found:
            if work.name not in self._told:
                self._told.add(work.name)
                self.say(f"trial {work.number}: a process of an earlier session is training it: waiting")
        return found

    def _expected(self, steps: int) -> float:
        return expected_seconds([run for trial in self.study.trials() for run in trial.runs], steps)

    def _steps_left(self, work: _Work) -> int:
        """Return the steps of a run after its newest checkpoint."""
        with suppress(DSparkError):
            return work.steps - read_progress(self.processes.runs / work.name).step
        return work.steps

    def _new(self) -> _Work | None:
        """Draw the settings of a new trial; None if there are none, or there are trials enough."""
        if len(self.study.trials()) >= (self.plan.most_trials or math.inf):
            return None
        all_of_them = math.prod(each.size for each in self.plan.space)
        tried = sum(len(key) == len(self.plan.space) for key in self._known)
        for _ in range(_MOST_SAME if tried < all_of_them else 0):
            drawn = self.study.ask(base_parameters(self.plan.space, self.plan.base))
            work = self._work(drawn, 0)
            key = settings_of(self.plan.space, drawn.params)
            if key in self._known:
                self.study.drop(drawn, self._known[key])
                continue
            self._known[key] = work.number
            try:
                trial_config(self.plan.base, work.settings)
            except ConfigError as error:
                self.say(f"trial {work.number}: {', '.join(work.settings)}")
                self._fail(work, str(error))
                continue
            return work
        self._searching = False
        self.say("all settings were tried, or those drawn were: the search ends")
        return None

    def _work(self, drawn: optuna.trial.Trial, rung: int) -> _Work:
        """Return a trial's run at a rung, with its values drawn. The first trial is the base config."""
        space, base, rungs = self.plan.space, self.plan.base, self.study.rungs or self.plan.ladder
        known = base_parameters(space, base)
        first = drawn.number == 0
        settings = tuple(each.draw(drawn) for each in space if not first or each.key in known)
        return _Work(
            number=drawn.number,
            settings=() if first else settings,
            steps=rungs[min(rung, len(rungs) - 1)],
            seed=base.train.seed,
            trial=drawn,
        )

    def _begin(self, work: _Work) -> None:
        """Start or continue a run."""
        config, settings = trial_config(self.plan.base, work.settings)
        minutes = self.clock.budget / 3600  # a kill loses at most a sixtieth of the budget
        if config.train.checkpoint_minutes:
            minutes = min(minutes, config.train.checkpoint_minutes)
        settings += (
            f"train.max_steps={work.steps}",
            f"train.seed={work.seed}",
            "train.eval_every=0",
            "train.early_stopping_patience=0",
            f"train.checkpoint_minutes={minutes:.3g}",
        )
        what = ", ".join(work.settings) or "your config"
        work.continued = (self.processes.runs / work.name).is_dir()
        verb = "continuing" if work.continued else "training"
        point = Point(name=work.name, file=self.plan.file, settings=settings, config=config)
        try:
            child = self.processes.start(point, work.name)
        except OSError as error:
            self._fail(work, f"{error.filename}: {error.strerror}")
            return
        self._at_work[work.name] = work
        self.say(f"{work.title}: {verb} {work.steps} steps{child.place}: {what}")

    def _end(self, child: Child, stop: StopRequest) -> None:
        """Note what has become of a run after its process ended."""
        work = self._at_work.pop(child.point.name)
        problem = child.problem()
        if problem is None:
            progress = read_progress(child.run)
            tau = (progress.evaluation or {}).get("tau")
            if tau is None or not math.isfinite(tau):
                problem = f"its held-out tau is {tau}"
        if problem is None:
            whole = None if work.continued else child.seconds
            run = Run(work.name, work.steps, work.seed, float(tau), progress.seconds, whole)
            self._passed(work, run)
        elif child.signalled and any(child.stopped_by(number) for number in _STOPS):
            self.waiting.insert(0, work)
            why = "stopped" if stop.signal is not None else "the budget is spent, stopped"
            self.say(f"{work.title}: {why}; its checkpoint is kept")
        elif any(child.stopped_by(number) for number in _STOPS):
            raise RunError(
                f"something else stopped {work.title} (exit code {child.process.returncode}): the "
                "same command continues"
            )
        else:
            self._fail(work, problem, str(child.log))

    def _passed(self, work: _Work, run: Run) -> None:
        """Note a complete run."""
        self._failures = 0
        if work.trial is None:
            self.study.add_repeat(work.number, run)
            self.say(f"{work.title}: held-out tau {run.tau:.3f}")
            drop_weights(self.processes.runs / run.name)
            return
        self.study.add_run(work.trial, run)
        trial = next(each for each in self.study.trials() if each.number == work.number)
        self._settle(work, list(trial.runs))

    def _settle(self, work: _Work, runs: list[Run]) -> None:
        """Decide by its last run whether a trial climbs on."""
        assert work.trial is not None
        rungs, last = self.study.rungs or self._decide(runs[-1]), runs[-1]
        said = f"trial {work.number}: {last.steps} steps, held-out tau {last.tau:.3f}"
        if last.whole is not None:
            said += f", {duration(last.whole)}"
        if last.steps >= rungs[-1]:
            self.study.complete(work.trial, last.tau)
            self.say(f"{said}: complete")
        elif self.study.stops(work.trial):
            self.say(f"{said}: pruned")
        else:
            self.say(f"{said}: climbs on")
            self.waiting.insert(0, self._work(work.trial, len(runs)))
        self._keep_best()

    def _decide(self, run: Run) -> list[int]:
        """Choose the rungs that the budget has time for, by a first run."""
        rungs = list(self.plan.ladder)
        if not self.plan.whole_ladder:
            most = self.clock.budget / SHARE
            rungs = [s for s in rungs if s <= run.steps or expected_seconds([run], s) <= most]
        self.study.rungs = rungs
        shown = ", ".join(f"{steps} (about {duration(expected_seconds([run], steps))})" for steps in rungs)
        self.say(f"rungs, in optimiser steps: {shown}")
        if len(rungs) < len(self.plan.ladder):
            self.say(
                f"longer runs would take over a {SHARE}th of the budget each: a larger budget in another "
                "--runs, or --longest, measures them"
            )
        if len(rungs) == 1:
            self.say("warning: all trials have runs of one length, so none is pruned")
        return rungs

    def _keep_best(self) -> None:
        """Remove the weights of complete runs other than the best one."""
        trials = self.study.trials()
        best = best_trial(trials)
        for run in (run for trial in trials for run in trial.runs):
            if (best is None or run.name != best.runs[-1].name) and run.name not in self._dropped:
                self._dropped.add(run.name)
                drop_weights(self.processes.runs / run.name)

    def _fail(self, work: _Work, problem: str, log: str = "") -> None:
        """Note a run that failed. Too many in a row end the search."""
        self.say(f"{work.title}: failed: {problem}{log and f'; log: {log}'}")
        if work.trial is None:
            return
        self.study.fail(work.trial, problem)
        self._failures += 1
        if self._failures >= _MOST_FAILURES:
            raise RunError(
                f"{_MOST_FAILURES} trials in a row failed, the last one by: {problem}. Fix that, and the "
                "same command continues with other trials"
            )

    def _repeats(self) -> list[_Work]:
        """Return the runs of the best settings with other seeds that are not there yet."""
        best = best_trial(self.study.trials())
        if best is None:
            return []
        seed, steps = self.plan.base.train.seed, best.runs[-1].steps
        known = {run.seed for run in self.study.repeats(best.number) if run.steps == steps}
        settings = () if best.number == 0 else self._settings(best)
        seeds = [s for s in range(seed + 1, seed + 1 + self.plan.repeats) if s not in known]
        return [_Work(number=best.number, settings=settings, steps=steps, seed=s, trial=None) for s in seeds]
