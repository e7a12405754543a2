"""Places of rows that samples share, against a plain list of rows."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from pipeline.cache.prefixes import ContextRows, within


def made(seed: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Lengths, shared rows and samples by shard of random samples, some of which share nothing."""
    generator = np.random.default_rng(seed)
    samples = generator.integers(1, 9, size=4).tolist()
    lengths = generator.integers(2, 12, size=sum(samples))
    shared = np.zeros_like(lengths)
    firsts = np.cumsum([0, *samples[:-1]])
    for i in range(1, len(lengths)):
        if i not in firsts and generator.random() < 0.8:
            shared[i] = generator.integers(0, min(lengths[i - 1], lengths[i] - 1) + 1)
    return lengths, shared, samples


def written(lengths: np.ndarray, shared: np.ndarray, samples: list[int]) -> list[list[int]]:
    """Rows of each sample, by writing shards row for row: (shard's row number) of its tokens."""
    found: list[list[int]] = []
    for number in samples:
        rows = 0
        for place in range(number):
            i = len(found)
            kept = found[i - 1][: shared[i]] if place else []
            own = list(range(rows, rows + int(lengths[i]) - len(kept)))
            rows += len(own)
            found.append([*kept, *own])
    return found


def context_rows(lengths: np.ndarray, shared: np.ndarray, samples: list[int]) -> ContextRows:
    starts = np.concatenate([np.cumsum(part) - part for part in np.split(lengths, np.cumsum(samples)[:-1])])
    return ContextRows(lengths, starts, samples, shared)


@pytest.mark.parametrize("seed", range(60))
def test_every_row_lies_where_it_was_written(seed: int) -> None:
    lengths, shared, samples = made(seed)
    rows, expected = context_rows(lengths, shared, samples), written(lengths, shared, samples)
    for i, want in enumerate(expected):
        places = rows.places(i)
        assert [row for place in places for row in range(place.start, place.stop)] == want
        assert all(a.stop != b.start for a, b in pairwise(places)), "neighbours are one"
        assert list(range(rows.own(i).start, rows.own(i).stop)) == want[shared[i] :]
        for begin, end in ((0, len(want)), (1, len(want)), (2, 2), (1, len(want) - 1)):
            found = within(places, slice(begin, end))
            assert [row for place in found for row in range(place.start, place.stop)] == want[begin:end]
    first = samples[0]
    assert rows.of_tokens(range(first)).tolist() == [row for each in expected[:first] for row in each]


@pytest.mark.parametrize("seed", range(60))
def test_unused_rows_are_those_that_no_good_sample_has(seed: int) -> None:
    lengths, shared, samples = made(seed)
    rows, expected = context_rows(lengths, shared, samples), written(lengths, shared, samples)
    generator = np.random.default_rng(seed + 1000)
    first = 0
    for number in samples:
        members = range(first, first + number)
        skipped = {i for i in members if generator.random() < 0.4}
        used = {row for i in members if i not in skipped for row in expected[i]}
        unused = rows.unused(members, skipped)
        assert unused.keys() == skipped
        found = {row for place in unused.values() for row in range(place.start, place.stop)}
        assert found == {row for i in skipped for row in expected[i]} - used
        first += number


def test_without_sharing_a_sample_is_one_range() -> None:
    rows = ContextRows(np.array([3, 2, 4]), np.array([0, 3, 0]), [2, 1], None)
    assert [rows.places(i) for i in range(3)] == [[slice(0, 3)], [slice(3, 5)], [slice(0, 4)]]
    assert rows.unused(range(2), {1}) == {1: slice(3, 5)}
