"""The learning curve of a tune: exact curves are found again, and the interval holds what it says it does."""

from __future__ import annotations

import numpy as np
import pytest

from train.experiments.tune import curve
from train.experiments.tune.curve import Point, expect, fit

A, B, C = {0: 1.40, 1: 1.50, 2: 1.45, 3: 1.30}, 1.5, 0.6


def tau(trial: int, steps: int) -> float:
    return A[trial] - B * steps**-C


def points(noise: float = 0.0, seed: int = 0) -> list[Point]:
    """Runs of a tune: two trials have three lengths, one has two and one a single run."""
    random = np.random.default_rng(seed)
    lengths = {0: (26, 78, 234), 1: (26, 78, 234), 2: (26, 78), 3: (26,)}
    return [
        Point(trial, steps, tau(trial, steps) + noise * random.standard_normal())
        for trial, own in lengths.items()
        for steps in own
    ]


def test_an_exact_curve_is_found_again() -> None:
    found = fit(points(), 1)
    assert found is not None
    assert (found.curve.a, found.curve.b, found.curve.c) == pytest.approx((A[1], B, C), abs=1e-6)
    assert found.curve.deviation == pytest.approx(0, abs=1e-9)
    expected = expect(points(), 1, 700, 5)
    assert expected.tau == pytest.approx(tau(1, 700))
    assert expected.low == pytest.approx(expected.high) == pytest.approx(tau(1, 700))
    assert expected.runs == 8  # the single run of trial 3 says nothing of the shape


def test_a_trial_of_one_run_has_the_shape_of_the_others() -> None:
    assert expect(points(), 3, 700, 5).tau == pytest.approx(tau(3, 700))


def test_the_interval_holds_most_new_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curve, "_DRAWS", 600)
    random, noise, inside, widths = np.random.default_rng(1), 0.004, 0, []
    for seed in range(40):
        found = expect(points(noise, seed), 1, 700, 5)
        inside += found.low <= tau(1, 700) + noise * random.standard_normal() <= found.high
        widths.append(found.high - found.low)
    assert inside >= 34  # of 40 at 95%
    assert 4 * noise < np.median(widths) < 30 * noise


def test_what_was_measured_is_not_extrapolated() -> None:
    runs = [*points(0.002), Point(1, 700, 1.48), Point(1, 700, 1.46)]
    found = expect(runs, 1, 700, 5)
    assert found.tau == pytest.approx(1.47)
    assert (found.curve, found.runs) == (None, 2)
    assert found.low < 1.46 < 1.48 < found.high


@pytest.mark.parametrize(
    "runs",
    [
        [],
        [Point(1, 26, 1.1)],
        [Point(1, 26, 1.1), Point(1, 78, 1.2), Point(1, 234, 1.3)],  # three figures, three unknowns
        [Point(t, s, 1.1) for t in (0, 1, 2) for s in (26, 78)],  # two lengths fit any exponent
    ],
)
def test_too_few_runs_say_nothing(runs: list[Point]) -> None:
    assert expect(runs, 1, 700, 5) is None
    measured = expect([*runs, Point(1, 700, 1.4)], 1, 700, 5)
    assert measured.tau == 1.4
    if len(runs) < 3:
        assert (measured.low, measured.high) == (None, None)


def test_a_curve_that_falls_is_flat_and_bounds_are_possible_taus() -> None:
    runs = [Point(t, s, 1.3 - 0.001 * s**0.5) for t in (0, 1, 2) for s in (26, 78, 234)]
    found = expect(runs, 1, 700, 5)
    assert found.curve.b == 0
    assert found.tau == pytest.approx(np.mean([p.tau for p in runs if p.trial == 1]))
    wild = expect(points(2.0), 1, 10**6, 5)
    assert (wild.low, wild.high) == (1.0, 5.0)
