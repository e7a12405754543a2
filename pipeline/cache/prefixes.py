"""Rows of context that samples with an equal beginning share.

A causal target's states at a token depend on the tokens up to it alone. So samples that begin with the same
tokens, a system prompt or a question with several answers, have equal rows there. A cache may store them
once (FORMAT.md, rule 4.1): the index then says of each sample how many of its first rows are those of the
sample before it in the shard. That one may have them from the one before, and so on.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import pyarrow as pa


class ContextRows:
    """The place of every sample's rows among the rows of context of its shard.

    Args:
        lengths: tokens of each sample, `[n]`.
        starts: first token of each sample in its shard, `[n]`.
        samples: number of samples of each shard.
        shared: first rows of each sample that are those of the one before, `[n]`; None for none.
    """

    def __init__(
        self, lengths: np.ndarray, starts: np.ndarray, samples: Sequence[int], shared: np.ndarray | None
    ):
        self._length, self._start, self._shared = lengths, starts, shared
        if shared is not None:
            numbers = np.array(samples, dtype=np.int64)
            self._start = sample_starts(lengths - shared, numbers)
            self._first = np.repeat(np.cumsum(numbers) - numbers, numbers)

    @classmethod
    def of(cls, table: pa.Table, samples: Sequence[int]) -> ContextRows:
        """Return those of an index.

        Args:
            table: the index, with the column `shared` or without it.
            samples: the plan's column.
        """
        shared = table["shared"].to_numpy() if "shared" in table.column_names else None
        return cls(table["length"].to_numpy(), table["token_start"].to_numpy(), samples, shared)

    def places(self, i: int) -> list[slice]:
        """Return where the rows of the index's sample `i` lie in its shard, as slices in order."""
        start, length = int(self._start[i]), int(self._length[i])
        if self._shared is None or not self._shared[i]:
            return [slice(start, start + length)]
        first = int(self._first[i])
        # Of each sample from here back to the shard's first: its rows up to where a later one has its own.
        own = self._shared[first : i + 1][::-1]
        ends = np.concatenate([[length], np.minimum.accumulate(own)[:-1]])
        found: list[slice] = []
        for back in np.flatnonzero(own < ends)[::-1]:
            begin = int(self._start[i - back])
            stop = begin + int(ends[back] - own[back])
            if found and found[-1].stop == begin:
                begin = found.pop().start
            found.append(slice(begin, stop))
        return found

    def of_tokens(self, samples: range) -> np.ndarray:
        """Return the row of each token of consecutive samples of a shard, `[T]`."""
        places = [place for i in samples for place in self.places(i)]
        return np.concatenate([np.arange(place.start, place.stop) for place in places])

    def own(self, i: int) -> slice:
        """Return where the rows of sample `i` lie that the sample before does not have."""
        start = int(self._start[i])
        return slice(start, start + int(self._length[i]) - self.shared(i))

    def shared(self, i: int) -> int:
        """Return how many of the first rows of sample `i` are those of the sample before."""
        return 0 if self._shared is None else int(self._shared[i])

    def unused(self, samples: range, skipped: Collection[int]) -> dict[int, slice]:
        """Return where the rows lie of each skipped sample that no other sample of its shard has.

        Args:
            samples: those of one shard.
            skipped: some of them.
        """
        found, needed = {}, 0  # first rows of the sample at hand that later ones have, none of them skipped
        for i in reversed(samples):
            own = self.own(i)
            if i in skipped:
                found[i] = slice(own.start + max(0, needed - self.shared(i)), own.stop)
            else:
                needed = int(self._length[i])
            needed = min(needed, self.shared(i))
        return found


def within(places: Sequence[slice], rows: slice) -> list[slice]:
    """Return some of the rows that lie at `places`.

    Args:
        rows: numbers of the rows, counted over all places.
    """
    begin, end, step = rows.indices(sum(place.stop - place.start for place in places))
    assert step == 1
    found, passed = [], 0
    for place in places:
        start = place.start + max(0, begin - passed)
        stop = place.start + min(place.stop - place.start, end - passed)
        if start < stop:
            found.append(slice(start, stop))
        passed += place.stop - place.start
    return found


def sample_starts(sizes: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """Return each sample's first row in its shard, `[n]`.

    Args:
        sizes: rows of each sample, `[n]`.
        samples: number of samples of each shard.
    """
    ends = np.cumsum(sizes, dtype=np.int64)
    return ends - sizes - np.repeat((ends - sizes)[np.cumsum(samples) - samples], samples)
