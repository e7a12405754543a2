"""The prefix scheduler: by brute force, and why it must not look ahead."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.decode.scheduler import schedule


def slowing(batch: int) -> float:
    """An engine whose step takes 10 ms and another for each token beyond four."""
    return 100 / (1 + max(0, batch - 4))


def throughput(confidences, lengths, steps_per_second: Callable[[int], float]) -> float:
    expected = len(confidences)
    for own, length in zip(confidences, lengths, strict=True):
        product = 1.0
        for confidence in own[:length]:
            product *= confidence
            expected += product
    return expected * steps_per_second(len(confidences) + sum(lengths))


def test_by_hand() -> None:
    """Two requests: products 0.9, 0.72, 0.072 and 0.5, 0.4; a batch of four is free, five halve the speed."""
    confidences = [[0.9, 0.8, 0.1], [0.5, 0.8]]
    assert schedule(confidences, slowing) == [2, 0]
    assert schedule(confidences, lambda _batch: 1.0) == [3, 2]
    assert schedule(confidences, lambda batch: 1 / batch) == [0, 0]
    assert schedule([[0.9], [0.8]], {2: 1.0, 3: 0.5, 4: 1.0}.__getitem__) == [0, 0]  # though [1, 1] is best
    assert schedule([], slowing) == []
    assert schedule([[], [0.9]], lambda _batch: 1.0) == [0, 1]
    assert schedule([[0.0, 1.0]], lambda _batch: 1.0) == [0]  # verifying it gains nothing


@given(
    st.lists(st.lists(st.floats(0.01, 0.99), max_size=4), min_size=1, max_size=3),
    st.floats(0.0, 0.5),
)
def test_where_speed_falls_steadily_it_is_the_best_there_is(confidences, slope: float) -> None:
    """With a step's time linear in the batch no later token can make up for an earlier one: brute force."""

    def steps_per_second(batch: int) -> float:
        return 1 / (1 + slope * batch)

    lengths = schedule(confidences, steps_per_second)
    best = max(
        throughput(confidences, choice, steps_per_second)
        for choice in itertools.product(*(range(len(own) + 1) for own in confidences))
    )
    assert throughput(confidences, lengths, steps_per_second) == pytest.approx(best)


def looks_ahead(confidences, steps_per_second: Callable[[int], float]) -> list[int]:
    """The best lengths there are, whatever they depend on."""
    choices = itertools.product(*(range(len(own) + 1) for own in confidences))
    return list(max(choices, key=lambda lengths: throughput(confidences, lengths, steps_per_second)))


def first_token(scheduler) -> dict[str, Fraction]:
    """The distribution of the first token out, exactly, for a draft that is the target itself.

    Both say A or B with probability 1/2, so every drafted token is accepted. The confidence of the second
    slot depends on the first token, as a Markov head's does: certain behind A, hopeless behind B. The
    engine runs batches of two at half the speed of one, and three as fast as two. A block that is not
    verified is thrown away, and the target samples its own token.
    """
    half = Fraction(1, 2)
    out = {"A": Fraction(0), "B": Fraction(0)}
    for token, second in (("A", 1.0), ("B", 0.0)):
        confidences = [[0.9, second]]
        (length,) = scheduler(confidences, {1: 1.0, 2: 0.5, 3: 0.5}.__getitem__)
        if length:
            out[token] += half
        else:
            for own in out:
                out[own] += half * half
    return out


def test_looking_ahead_is_not_lossless_and_this_does_not() -> None:
    """Of the same kind as the paper's appendix A: a length that depends on the token it decides about."""
    assert looks_ahead([[0.9, 1.0]], {1: 1.0, 2: 0.5, 3: 0.5}.__getitem__) == [2]
    assert looks_ahead([[0.9, 0.0]], {1: 1.0, 2: 0.5, 3: 0.5}.__getitem__) == [0]
    assert first_token(looks_ahead) == {"A": Fraction(3, 4), "B": Fraction(1, 4)}
    assert first_token(schedule) == {"A": Fraction(1, 2), "B": Fraction(1, 2)}


@given(
    st.lists(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.floats(0.1, 1.0), min_size=16, max_size=16),
    st.data(),
)
def test_whether_a_token_is_verified_does_not_depend_on_what_is_behind_it(confidences, speeds, data) -> None:
    request = data.draw(st.integers(0, len(confidences) - 1))
    position = data.draw(st.integers(0, len(confidences[request]) - 1))
    behind = data.draw(st.lists(st.floats(0.0, 1.0), max_size=4))
    other = [list(own) for own in confidences]
    other[request] = other[request][: position + 1] + behind
    before, after = (schedule(each, speeds.__getitem__)[request] for each in (confidences, other))
    assert (before > position) == (after > position)
