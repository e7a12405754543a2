"""The order of samples that share rows of context: those with an equal beginning follow each other.

`--share-prefixes` stores the context of equal beginnings once, see `pipeline.cache.prefixes`. A sample shares
rows with the one before, so here samples are put in order: inside the windows of the plan, those that have a
long beginning in common stay together, and among these the ones that have more in common, first. Samples that
differ are sorted by length, longest first, so that a batch has little padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from capture.data.tokens import TokenizedData


# Fewer tokens than these are not shared: each sample that shares some is read in one part more.
LEAST = 16
# Tokens that a beginning must have in common, beyond that of the group around it, to make a group. A forward
# carries on from a whole number of these, so that few beginnings are computed apart for a token or two.
STEP = 64


def usable(common: int) -> int:
    """Return how many of `common` equal first tokens a forward of the rest starts from."""
    return common // STEP * STEP


def arranged(data: TokenizedData, groups: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Return an order of samples, and how many first tokens each has in common with the one before.

    Args:
        groups: of each sample; samples of two groups share nothing.
        window: samples that are ordered together.

    Returns:
        The data's number of each sample, `[n]`, and its first tokens in common, `[n]`: fewer than it has, and
        none of less than `LEAST`.
    """
    order, shared = [], []
    for start in range(0, len(data), window):
        numbers = range(start, min(start + window, len(data)))
        tokens = [data[i].input_ids for i in numbers]
        found, common = _arrange_window(tokens, groups[numbers.start : numbers.stop])
        order.append(np.array(found, np.int64) + start)
        shared.append(common)
    empty = [np.empty(0, np.int64)]
    return np.concatenate(order or empty), np.concatenate(shared or empty)


def _arrange_window(tokens: Sequence[np.ndarray], groups: np.ndarray) -> tuple[list[int], np.ndarray]:
    """Return the order of some samples, and the first tokens that each has in common with the one before."""
    keys = [groups[i].tobytes() + ids.astype(">u4").tobytes() for i, ids in enumerate(tokens)]
    alphabetic = sorted(range(len(tokens)), key=keys.__getitem__)

    def common(one: int, other: int) -> int:
        return 0 if groups[one] != groups[other] else equal_start(tokens[one], tokens[other])

    beside = np.array([common(a, b) for a, b in pairwise(alphabetic)], np.int64)
    lengths = np.array([len(tokens[i]) for i in alphabetic])
    order = [alphabetic[place] for place in _ordered(range(len(alphabetic)), beside, lengths)]
    shared = [0, *(common(a, b) for a, b in pairwise(order))]
    fewer = np.array([min(n, len(tokens[i]) - 1) for n, i in zip(shared, order, strict=True)], np.int64)
    return order, np.where(fewer < LEAST, 0, fewer)


def _ordered(places: range, beside: np.ndarray, lengths: np.ndarray) -> list[int]:
    """Return alphabetically sorted samples in the order described above.

    Args:
        places: their places in the alphabetical order, at least one.
        beside: first tokens in common of each place and the next one.
        lengths: tokens of the sample at each place.
    """
    order: list[int] = []
    waiting: list[range | list[int]] = [places]
    while waiting:
        some = waiting.pop()
        if isinstance(some, list):
            order += some
            continue
        inner = beside[some.start : some.stop - 1]
        base = int(inner.min()) if len(inner) else 0  # what all of them have in common
        parts = list(_cut(some, inner < base + STEP))
        alone = [part.start for part in parts if len(part) == 1]
        # Behind the groups, whose last samples a shorter one may be the beginning of.
        waiting.append(sorted(alone, key=lambda place: -int(lengths[place])))
        waiting += [part for part in reversed(parts) if len(part) > 1]
    return order


def _cut(places: range, between: np.ndarray) -> Iterator[range]:
    """Cut a range behind each place where `between` is True."""
    start = places.start
    for end in (np.flatnonzero(between) + places.start + 1).tolist():
        yield range(start, end)
        start = end
    yield range(start, places.stop)


def equal_start(one: np.ndarray, other: np.ndarray) -> int:
    """Return the number of first tokens that are equal."""
    length = min(len(one), len(other))
    differ = np.flatnonzero(one[:length] != other[:length])
    return int(differ[0]) if len(differ) else length
