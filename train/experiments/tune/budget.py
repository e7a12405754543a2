"""The budget of a tune: time that its sessions take in all, and what a run is expected to take of it."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median

from pipeline.errors import UsageError
from train.experiments.tune.study import Run, Study

NOTE_SECONDS = 5.0
"""Seconds between notes of the time spent: what a tune that is killed may not count."""
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_budget(text: str) -> float:
    """Return the seconds of a budget such as 90s, 15m, 2h, 1h30m or 1.5d. Raise UsageError for others."""
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", text)
    seconds = sum(float(number) * _UNITS[unit] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != text or not seconds:
        raise UsageError(f"expected --budget as a time such as 15m, 2h or 1h30m, got {text!r}")
    return seconds


@dataclass
class Clock:
    """Time that the sessions of a study took, this one included."""

    study: Study
    budget: float
    """Seconds of all sessions."""
    now: Callable[[], float] = time.monotonic
    _noted: float = field(init=False)
    _since: float = field(init=False)

    def __post_init__(self) -> None:
        self._noted, self._since = self.study.seconds, self.now()

    @property
    def spent(self) -> float:
        return self._noted + self.now() - self._since

    @property
    def left(self) -> float:
        return self.budget - self.spent

    def note(self, *, at_once: bool = False) -> None:
        """Write the time spent to the study, if the last note is old."""
        if at_once or self.now() - self._since >= NOTE_SECONDS:
            spent = self.spent
            self.study.seconds = spent
            self._noted, self._since = spent, self.now()


def expected_seconds(runs: Sequence[Run], steps: int) -> float:
    """Return the seconds that a run of so many steps takes, by those that others took.

    A run's start, its evaluation and its end take the same time whatever its length.

    Args:
        runs: complete ones; without any it is 0.
    """
    rates = [run.seconds / run.steps for run in runs]
    rests = [run.whole - run.seconds for run in runs if run.whole is not None]
    return (median(rates) if rates else 0.0) * steps + (median(rests) if rests else 0.0)
