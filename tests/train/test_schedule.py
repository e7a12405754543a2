"""The prefix schedulers: by brute force, and why they must not look ahead."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.decode.scheduler import schedule, schedule_globally


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


# The paper's appendix A. A batch of one, two and three tokens; the target says A and B with 0.7 and 0.3, the
# draft with 0.5 each. It is 0.8 sure of its first token, and of the next one 0.9 after A, and 0 after B.
SPEEDS = {1: 1.0, 2: 0.5, 3: 0.45}
TARGET = {"A": Fraction(7, 10), "B": Fraction(3, 10)}
DRAFT = {"A": Fraction(1, 2), "B": Fraction(1, 2)}
SECOND = {"A": 0.9, "B": 0.0}


def first_token(scheduler) -> dict[str, Fraction]:
    """Compute the distribution of the first token out, exactly, over all drafts and all outcomes.

    A drafted token that is verified goes through the rejection rule. One that is not is thrown away, and the
    target samples its own.
    """
    out = {"A": Fraction(0), "B": Fraction(0)}
    over = {token: max(TARGET[token] - DRAFT[token], Fraction(0)) for token in out}
    for token in out:
        (length,) = scheduler([[0.8, SECOND[token]]], SPEEDS.__getitem__)
        accepted = min(Fraction(1), TARGET[token] / DRAFT[token]) if length else Fraction(0)
        instead = over if length else TARGET
        out[token] += DRAFT[token] * accepted
        for other, weight in instead.items():
            out[other] += DRAFT[token] * (1 - accepted) * weight / sum(instead.values())
    return out


def test_appendix_a() -> None:
    """Its numbers: looking ahead verifies only where A was drafted, so A has 0.85 instead of 0.7."""
    none, one, two = ([0], [1], [2])
    for token, best in (("A", 1.134), ("B", 0.81)):
        drafted = [[0.8, SECOND[token]]]
        found = [throughput(drafted, lengths, SPEEDS.__getitem__) for lengths in (none, one, two)]
        assert found == pytest.approx([1.0, 0.9, best])
    assert looks_ahead([[0.8, SECOND["A"]]], SPEEDS.__getitem__) == two
    assert looks_ahead([[0.8, SECOND["B"]]], SPEEDS.__getitem__) == none
    # Where A is drafted it is verified, and always accepted: 0.5 + 0.5 * 0.7.
    assert first_token(looks_ahead) == {"A": Fraction(85, 100), "B": Fraction(15, 100)}
    assert schedule([[0.8, SECOND["A"]]], SPEEDS.__getitem__) == none
    assert schedule([[0.8, SECOND["B"]]], SPEEDS.__getitem__) == none
    assert first_token(schedule) == TARGET


def test_the_global_search_needs_confidences_of_an_earlier_step() -> None:
    """On those of the drafted tokens it looks ahead; on any that they do not decide it is lossless."""

    def at_once(confidences, speeds):
        return schedule_globally(confidences, speeds, least=0)

    assert first_token(at_once) == {"A": Fraction(85, 100), "B": Fraction(15, 100)}
    for earlier in ([0.8, 0.9], [0.8, 0.0], [0.1, 0.1]):
        assert first_token(lambda _now, speeds, e=earlier: at_once([e], speeds)) == TARGET


@given(
    st.lists(st.lists(st.floats(0.01, 0.99), max_size=4), min_size=1, max_size=3),
    st.lists(st.floats(0.1, 1.0), min_size=16, max_size=16),
    st.integers(0, 2),
)
def test_the_global_search_finds_the_best_there_is(confidences, speeds, least: int) -> None:
    """By brute force over all lengths, for any speeds at all."""
    lengths = schedule_globally(confidences, speeds.__getitem__, least=least)
    choices = itertools.product(*(range(min(least, len(own)), len(own) + 1) for own in confidences))
    best = max(throughput(confidences, choice, speeds.__getitem__) for choice in choices)
    assert throughput(confidences, lengths, speeds.__getitem__) == pytest.approx(best)


def test_the_global_search_by_hand() -> None:
    """Beyond a step down it goes on, where Algorithm 1 stops; a small gain does not cut blocks."""
    speeds = {2: 1.0, 3: 0.5, 4: 0.9, 5: 0.3, 6: 0.3}.__getitem__
    confidences = [[0.9, 0.5], [0.8, 0.5]]  # products 0.9, 0.8, 0.45, 0.4
    assert schedule(confidences, speeds) == [0, 0]
    assert schedule_globally(confidences, speeds) == [1, 1]  # (2 + 1.7) * 0.9 = 3.33 of at most 4.55 * 0.3
    assert schedule_globally(confidences, speeds, least=2) == [2, 2]
    flat = {4: 1.0, 5: 1.0, 6: 0.95}.__getitem__  # 3.7, 4.15 and 4.3225
    assert schedule_globally(confidences, flat) == [2, 2]
    falling = {4: 1.0, 5: 1.0, 6: 0.9}.__getitem__  # 3.7, 4.15 and 4.095: 1.3% more
    assert schedule_globally(confidences, falling) == [2, 1]
    assert schedule_globally(confidences, falling, least_gain=0.01) == [2, 1]
    assert schedule_globally(confidences, falling, least_gain=0.02) == [2, 2]
    assert schedule_globally([], speeds) == []
    assert schedule_globally([[], [0.5]], lambda batch: 1 / batch) == [0, 1]


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
