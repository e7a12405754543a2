"""Split and steps that a cache allows: the smallest share that works, against a search over ids."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cache.split import held_out, held_out_problem, smallest_share, training_lines


def ids(*leading: int) -> np.ndarray:
    """Sample ids `[n, 16]` with these first 32 bits."""
    found = np.zeros((len(leading), 16), dtype=np.uint8)
    for row, number in zip(found, leading, strict=True):
        row[:4] = list(number.to_bytes(4, "big"))
    return found


@given(st.lists(st.integers(0, 2**32 - 1), min_size=2, max_size=9, unique=True))
def test_the_smallest_share_holds_one_out_and_leaves_one(leading: list[int]) -> None:
    share = smallest_share(ids(*leading))
    if share is None:  # ids so close that no short number lies between
        first, second = sorted(leading)[:2]
        assert second - first < 2**32 / 1e9 * max(1, first)
        return
    out = [number for number in leading if number < share * 2**32]
    assert out
    assert len(out) < len(leading)
    assert held_out_problem(ids(*leading), share) is None
    # No share below the first sample's own holds anything out, and the found one is at most a tenth above.
    assert not held_out(ids(*leading), min(leading) / 2**32).any()
    assert share <= 1.1 * (min(leading) + 1) / 2**32 + 1e-12


@pytest.mark.parametrize(
    ("leading", "fraction", "said"),
    [
        (
            (2**31, 2**31 + 2**30),
            0.05,
            "no sample held out of the cache's 2: the smallest share that works is 0.51",
        ),
        (
            (2**20, 2**30),
            0.5,
            "no sample left to train on of the cache's 2: the smallest share",
        ),
        ((5,), 0.05, "no sample left to train on of the cache's 1: capture more data"),
    ],
)
def test_a_share_that_does_not_split_is_named(leading, fraction, said) -> None:
    assert said in held_out_problem(ids(*leading), fraction)


def test_steps_by_hand() -> None:
    """Of 300 samples of 4,096 tokens, 0.05 of the ids held out: 285 batches, 3 steps of 128, 10 epochs."""
    spaced = ids(*(-(-i * 2**32 // 300) for i in range(300)))
    line, warning = training_lines(spaced, np.full(300, 4096))
    assert "about 30 optimiser steps, 10 epochs of about 3; 15 samples held out" in line
    assert warning.startswith(
        "warning: if the run's config keeps the defaults, fewer than 100 optimiser steps"
    )
    fewer = int(re.search(r"micro_batches_per_step from 128 to (\d+)", warning)[1])
    assert fewer == 28
    assert 10 * -(-285 // fewer) >= 100
    assert len(list(training_lines(spaced, np.full(300, 4096 * 6)))) == 1
