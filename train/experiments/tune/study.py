"""The study of a tune: optuna's file, what it was asked for, and the trials in it.

Everything that a tune knows is in the file: a killed one loses at most the current run's steps since its last
checkpoint. Values of a trial depend on the seed, the trial's number and the results before it, not on the
process that draws them, so a tune that was stopped draws the same trials as one that was not.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from pipeline import config as configuration
from pipeline.config import show
from pipeline.errors import RunError
from pipeline.text import one_line

if TYPE_CHECKING:
    import optuna

STUDY = "tune.db"
"""optuna's file in the folder of the runs."""
FACTOR = 3
"""Ratio of the lengths of neighbouring rungs, and share of the trials that a rung stops."""
_NAME = "tune"
_REQUEST, _RUNGS, _SECONDS, _REPEATS = "request", "rungs", "seconds", "repeats"
_RUNS, _PROBLEM, _SAME = "runs", "problem", "same as trial"


@dataclass(frozen=True)
class Run:
    """A complete run of a trial."""

    name: str
    """Name of its directory."""
    steps: int
    """Optimiser steps."""
    seed: int
    """Of the run: train.seed."""
    tau: float
    """Held-out tau at the end."""
    seconds: float
    """Seconds spent on its steps, by the run's own count."""
    whole: float | None
    """Seconds from the start of its process to the end; None if it was stopped between."""


@dataclass(frozen=True)
class Trial:
    """A trial as the study has it."""

    number: int
    state: str
    """`complete`, `pruned`, `failed` or `waiting`: begun, and to be continued."""
    parameters: Mapping[str, Any]
    """Drawn values by dotted name."""
    runs: tuple[Run, ...]
    """Complete runs, the shortest first."""
    problem: str | None
    """Why it failed."""
    id: int


def require_optuna() -> None:
    """Raise RunError when optuna is not installed; import nothing."""
    found = importlib.util.find_spec("optuna")
    if found is None or found.origin is None:  # no origin: a mere folder of that name
        raise RunError("dspark tune needs optuna: pip install 'dspark-pipeline[tune]'")


@contextmanager
def database_errors(path: Path, *also: type[Exception]) -> Iterator[None]:
    """Turn errors of a study's file, such as of a full disk, into a RunError.

    Args:
        also: further errors to turn.
    """
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (SQLAlchemyError, StorageInternalError, *also) as error:
        cause = getattr(error, "orig", None) or error.__cause__ or error
        raise RunError(
            f"{path} can't be used as the file of a study ({one_line(cause)}): fix that, or choose another "
            "--runs"
        ) from None


class Study:
    """An optuna study in a folder.

    Args:
        folder: of the runs; made before.
        request: what is searched, and over what. A later session has to ask for the same.
        seed: of the search.
        shortest: optimiser steps of the first rung.

    Raises:
        RunError: the folder has the study of another request, or its file can't be used.
    """

    def __init__(self, folder: Path, request: Mapping[str, Any], seed: int, shortest: int):
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.path = folder / STUDY
        self.new = not self.path.exists()
        if self.new and any(folder.glob("trial-*/")):
            raise RunError(
                f"{folder} holds runs of a tune but not its {STUDY}: choose another --runs, or remove them"
            )
        with database_errors(self.path, RuntimeError, AssertionError):  # of another version
            place = f"file:{quote(str(self.path.resolve()))}?uri=true"  # a path may hold a question mark
            storage = optuna.storages.RDBStorage(f"sqlite:///{place}")
            self._study = optuna.create_study(
                storage=storage,
                study_name=_NAME,
                direction="maximize",
                sampler=_sampler(seed),
                pruner=optuna.pruners.SuccessiveHalvingPruner(min_resource=shortest, reduction_factor=FACTOR),
                load_if_exists=True,
            )
        self._trials: list[Trial] | None = None
        self._check(json.loads(json.dumps(request)), folder)

    def _check(self, request: Mapping[str, Any], folder: Path) -> None:
        theirs = self._get(_REQUEST)
        if theirs is None:
            self._study.set_user_attr(_REQUEST, dict(request))
            return
        differing = [
            f"{key}: {show(theirs.get(key))} against {show(request.get(key))}"
            for key in {**theirs, **request}
            if theirs.get(key) != request.get(key)
        ]
        if differing:
            raise RunError(
                f"{folder} holds another tune (its own against yours: {'; '.join(differing)}): ask for the "
                "same, or choose another --runs"
            )

    def _get(self, name: str) -> Any:
        return self._study.user_attrs.get(name)

    @property
    def rungs(self) -> list[int] | None:
        """Lengths of runs in optimiser steps, the shortest first; None until they are decided."""
        return self._get(_RUNGS)

    @rungs.setter
    def rungs(self, steps: list[int]) -> None:
        self._study.set_user_attr(_RUNGS, steps)

    @property
    def seconds(self) -> float:
        """Seconds that all sessions took until the last note."""
        return self._get(_SECONDS) or 0.0

    @seconds.setter
    def seconds(self, seconds: float) -> None:
        self._study.set_user_attr(_SECONDS, seconds)

    def repeats(self, number: int) -> list[Run]:
        """Return the runs of a trial with other seeds."""
        found = (self._get(_REPEATS) or {}).get(str(number), [])
        return [configuration.build(Run, run, _REPEATS) for run in found]

    def add_repeat(self, number: int, run: Run) -> None:
        """Note a run of a trial with another seed."""
        known = self._get(_REPEATS) or {}
        known[str(number)] = [*known.get(str(number), []), asdict(run)]
        self._study.set_user_attr(_REPEATS, known)

    def trials(self) -> list[Trial]:
        """Return all trials but those that drew the settings of another one."""
        if self._trials is None:
            self._trials = self._read()
        return self._trials

    def _read(self) -> list[Trial]:
        states = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}
        return [
            Trial(
                each.number,
                states.get(each.state.name, "waiting"),
                each.params,
                tuple(_runs(each)),
                each.user_attrs.get(_PROBLEM),
                each._trial_id,
            )
            for each in self._study.get_trials(deepcopy=False)
            if _SAME not in each.user_attrs and each.state.name != "WAITING"
        ]

    def ask(self, first: Mapping[str, Any]) -> optuna.trial.Trial:
        """Begin a trial.

        Args:
            first: values of the study's first trial, by dotted name.
        """
        if not self._study.get_trials(deepcopy=False):
            self._study.enqueue_trial(dict(first))
        self._trials = None
        return self._study.ask()

    def reopen(self, trial: Trial) -> optuna.trial.Trial:
        """Return a trial that waits, to continue it."""
        import optuna

        found = optuna.trial.Trial(self._study, trial.id)
        known = found.storage.get_trial(trial.id).intermediate_values
        for run in trial.runs:  # killed between the note and the report
            if run.steps not in known:
                found.report(run.tau, run.steps)
        return found

    def add_run(self, trial: optuna.trial.Trial, run: Run) -> None:
        """Note a complete run of a trial."""
        self._trials = None
        trial.set_user_attr(_RUNS, [*trial.user_attrs.get(_RUNS, []), asdict(run)])
        trial.report(run.tau, run.steps)

    def stops(self, trial: optuna.trial.Trial) -> bool:
        """Return whether the rung of a trial's last run stops it, and note that it was pruned."""
        if not trial.should_prune():
            return False
        self._tell(trial, "PRUNED")
        return True

    def complete(self, trial: optuna.trial.Trial, tau: float) -> None:
        """Note that a trial has passed the last rung."""
        self._tell(trial, "COMPLETE", tau)

    def fail(self, trial: optuna.trial.Trial, problem: str) -> None:
        """Note that a trial failed."""
        trial.set_user_attr(_PROBLEM, problem)
        self._tell(trial, "FAIL")

    def drop(self, trial: optuna.trial.Trial, same: int) -> None:
        """Note that a trial drew the settings of another one."""
        trial.set_user_attr(_SAME, same)
        self._tell(trial, "FAIL")

    def _tell(self, trial: optuna.trial.Trial, state: str, value: float | None = None) -> None:
        from optuna.trial import TrialState

        self._trials = None
        self._study.tell(trial, value, TrialState[state])


def _runs(trial: optuna.trial.FrozenTrial) -> list[Run]:
    return [configuration.build(Run, run, _RUNS) for run in trial.user_attrs.get(_RUNS, [])]


def _sampler(seed: int) -> optuna.samplers.BaseSampler:
    """Return a TPE sampler whose draw depends on seed, trial, setting and the study, on no earlier draw."""
    import optuna

    class Sampler(optuna.samplers.BaseSampler):
        def infer_relative_search_space(self, study: Any, trial: Any) -> dict[str, Any]:
            return {}

        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> dict[str, Any]:
            return {}

        def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
            text = f"{seed} {trial.number} {param_name}".encode()
            own = int.from_bytes(hashlib.sha256(text).digest()[:4])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                sampler = optuna.samplers.TPESampler(seed=own)
            return sampler.sample_independent(study, trial, param_name, param_distribution)

    return Sampler()
