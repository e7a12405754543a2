"""Learning curve of a tune, fitted to complete runs of several lengths, and what a longer one is to reach.

The curve of trial i is tau(s) = a_i - b * s ** -c over the s optimiser steps of a complete run. All trials
share b and c: most have runs of one or two lengths, from which a shape of their own can't be found.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
"""Probability of the interval."""
LEAST_LENGTHS = 3
"""Different lengths of runs without which b and c can't both be found."""
_EXPONENTS = np.linspace(0.1, 2.0, 77)
_DRAWS = 4000


@dataclass(frozen=True)
class Point:
    """Held-out figure of one complete run."""

    trial: int
    steps: int
    """Optimiser steps of the run."""
    tau: float


@dataclass(frozen=True)
class Curve:
    """A fitted learning curve of one trial."""

    a: float
    """Its limit."""
    b: float
    c: float
    deviation: float
    """Standard deviation of the runs about the curves, those of all trials together."""

    def at(self, steps: int) -> float:
        return self.a - self.b * steps**-self.c


@dataclass(frozen=True)
class Expected:
    """Held-out tau expected of a new run of a trial's settings."""

    steps: int
    """Optimiser steps of that run."""
    tau: float
    low: float | None
    """Bounds of the interval that holds it with a probability of `LEVEL`; None if the runs are too few."""
    high: float | None
    curve: Curve | None
    """None if runs of this length were measured, whose mean `tau` is."""
    runs: int
    """Runs that were used."""


class _Fit:
    """Least squares over a grid of exponents, for many vectors of figures at once."""

    def __init__(self, points: Sequence[Point], trial: int, freedom: int):
        trials = sorted({p.trial for p in points}, key=lambda number: (number != trial, number))
        steps = np.array([p.steps for p in points], dtype=float)
        self.freedom = freedom
        self.offsets = np.array([[p.trial == number for number in trials] for p in points], dtype=float)
        self.designs = [np.column_stack([self.offsets, -(steps**-c)]) for c in _EXPONENTS]
        self.inverses = [np.linalg.pinv(design) for design in self.designs]
        taus = np.array([[p.tau for p in points]])
        a, b, c, self.fitted = self.solve(taus)
        self.squares = float(((taus - self.fitted) ** 2).sum())
        self.curve = Curve(float(a[0]), float(b[0]), float(c[0]), (self.squares / freedom) ** 0.5)

    def solve(self, taus: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return a of the trial, b, c `[n]` and the fitted values `[n, points]` for figures `[n, points]`.

        A curve that would fall is a constant: b is 0.
        """
        found = taus @ np.linalg.pinv(self.offsets).T
        fitted = found @ self.offsets.T
        squares = ((taus - fitted) ** 2).sum(1)
        a, b, c = found[:, 0], np.zeros(len(taus)), np.full(len(taus), _EXPONENTS[0])
        for exponent, design, inverse in zip(_EXPONENTS, self.designs, self.inverses, strict=True):
            found = taus @ inverse.T
            values = found @ design.T
            own = ((taus - values) ** 2).sum(1)
            better = (own < squares) & (found[:, -1] > 0)
            squares = np.where(better, own, squares)
            fitted = np.where(better[:, None], values, fitted)
            a, b = np.where(better, found[:, 0], a), np.where(better, found[:, -1], b)
            c = np.where(better, exponent, c)
        return a, b, c, fitted


def fit(points: Sequence[Point], trial: int) -> _Fit | None:
    """Fit the curve of a trial beside those of all others; None if the runs are too few."""
    runs = Counter(p.trial for p in points)
    used = [p for p in points if runs[p.trial] > 1 or p.trial == trial]
    freedom = len(used) - len({p.trial for p in used}) - 2
    if len({p.steps for p in used}) < LEAST_LENGTHS or freedom < 1 or trial not in runs:
        return None
    return _Fit(used, trial, freedom)


def expect(points: Sequence[Point], trial: int, steps: int, most: float) -> Expected | None:
    """Return the figure to expect of a new run of a trial's settings.

    Where runs of that length were measured it is their mean, else the curve's value. The interval is of a
    parametric bootstrap: the deviation of the runs from the curves is drawn as their number leaves it open,
    then figures are drawn with it, fitted again, and the new run's own deviation is added.

    Args:
        points: complete runs of all trials.
        steps: optimiser steps of the new run.
        most: K + 1, which no tau exceeds.

    Returns:
        None if no run of that length was measured and the runs are too few for a curve.
    """
    found = fit(points, trial)
    measured = [p.tau for p in points if p.trial == trial and p.steps == steps]
    if found is None:
        if not measured:
            return None
        return Expected(steps, float(np.mean(measured)), None, None, None, len(measured))
    random = np.random.default_rng(0)
    deviations = np.sqrt(found.squares / random.chisquare(found.freedom, _DRAWS))
    own = deviations * random.standard_normal(_DRAWS)
    if measured:
        tau, curve, runs = float(np.mean(measured)), None, len(measured)
        means = tau + deviations * random.standard_normal(_DRAWS) / np.sqrt(runs)
    else:
        tau, curve, runs = found.curve.at(steps), found.curve, found.fitted.shape[1]
        noise = deviations[:, None] * random.standard_normal((_DRAWS, runs))
        a, b, c, _ = found.solve(found.fitted + noise)
        means = a - b * float(steps) ** -c
    tail = (1 - LEVEL) / 2
    low, high = np.clip(np.quantile(means + own, [tail, 1 - tail]), 1.0, most)
    return Expected(steps, tau, float(low), float(high), curve, runs)
