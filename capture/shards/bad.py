"""Bad samples: their states can't be used, or the target can't compute them here. See --bad-states."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from capture.console import note
from pipeline.cache.layout import LAST_HIDDEN
from pipeline.cache.skipped import ALL_ZERO, NOT_FINITE, REASONS, TOO_LARGE
from pipeline.errors import TargetError

# Samples of one reason that are named one by one: while the capture runs, and where there are too many.
MAX_NAMED = 5
_PROBLEMS = {NOT_FINITE: "holds NaN or infinity", ALL_ZERO: "is all zero"}
_REMEDIES = {
    NOT_FINITE: "check the target's weights, or try --dtype float32",
    ALL_ZERO: "check the target's weights, or try --dtype float32",
    TOO_LARGE: "lower --max-length, or spread the target over more GPUs with --device-map auto",
}


def peaks_reason(peaks: np.ndarray) -> str | None:
    """Return the reason to skip a sample, None for a good one, given the largest absolute value per row."""
    if not np.isfinite(peaks).all():
        return NOT_FINITE
    return None if peaks.any() else ALL_ZERO


def state_name(key: int | str) -> str:
    """Return the name of a state in messages."""
    return "the last hidden state" if key == LAST_HIDDEN else f"layer {key}"


def problem(place: str, reason: str, key: int | str | None, tokens: int, remedy: str = "") -> str:
    """Return a sentence about a bad sample.

    Args:
        place: the sample's, for people.
        key: the state that shows it, a layer id or `last_hidden`.
        remedy: what else to do.
    """
    if reason == TOO_LARGE:
        what = f"the sample at {place}, {tokens:,} tokens, does not fit the device's memory by itself"
    else:
        what = (
            f"{state_name(LAST_HIDDEN if key is None else key)} of the sample at {place} {_PROBLEMS[reason]}"
        )
    return f"{what}: {_REMEDIES[reason]}{remedy}"


class BadSamples:
    """The bad samples of a cache that this process knows, and what becomes of them.

    Args:
        skip: record them and go on; else the first one is an error.
        share: maximum share of the cache's samples. One sample is always allowed.
        index: the sample index.
        sources: names of the index's sources.
        known: reasons by row of the index, of shards that are finished.
    """

    def __init__(
        self,
        skip: bool,
        share: float,
        index: pa.Table,
        sources: Sequence[str],
        known: Mapping[int, str] | None = None,
    ):
        self.skip, self._sources, self._number = skip, sources, len(index)
        self._limit = max(1, int(share * len(index) + 1e-9))
        self._share = share
        self._source, self._row, self._length = (
            index[name].to_numpy() for name in ("source", "source_row", "length")
        )
        self._reasons = dict(known or {})
        self._named: Counter[str] = Counter()
        self._lock = threading.Lock()

    def place(self, number: int) -> str:
        """Return the place in the user's data of the sample in row `number` of the index."""
        return f"row {int(self._row[number]) + 1} of {self._sources[int(self._source[number])]}"

    def found(self, number: int, reason: str, key: int | str | None = None) -> None:
        """Take note of a bad sample.

        Args:
            number: its row of the index.
            reason: one of `pipeline.cache.skipped.REASONS`.
            key: the state that shows it.

        Raises:
            TargetError: samples are not to be skipped; the message says how to go on.
        """
        tokens = int(self._length[number])
        if not self.skip:
            on = "; or run the same command with --bad-states skip, which goes on without such samples"
            raise TargetError(problem(self.place(number), reason, key, tokens, on))
        with self._lock:
            new, self._reasons[number] = number not in self._reasons, reason
            self._named[reason] += new
            named = self._named[reason]
        if new and named <= MAX_NAMED:
            end = "; further such ones are recorded without a warning" if named == MAX_NAMED else ""
            note(f"warning: skipped: {problem(self.place(number), reason, key, tokens)}{end}")

    def check(self, reasons: Mapping[int, str] | None = None) -> None:
        """Refuse more bad samples than --max-bad-states allows.

        Args:
            reasons: all bad samples; None takes those that this process knows.

        Raises:
            TargetError: with counts and places.
        """
        with self._lock:
            reasons = dict(self._reasons if reasons is None else reasons)
        if len(reasons) <= self._limit:
            return
        parts = []
        for reason in REASONS:
            numbers = sorted(number for number, why in reasons.items() if why == reason)
            if numbers:
                named = ", ".join(map(self.place, numbers[:MAX_NAMED]))
                more = f" and {len(numbers) - MAX_NAMED:,} more" if len(numbers) > MAX_NAMED else ""
                parts.append(f"{len(numbers):,} {reason} ({named}{more})")
        raise TargetError(
            f"{len(reasons):,} of {self._number:,} samples are bad, --max-bad-states {self._share:.4g} "
            f"allows {self._limit:,}: {'; '.join(parts)}. So many point to the target or its dtype, not to "
            "the data: check its weights, or try --dtype float32 in a new cache. Every finished shard is "
            "kept: the same command with a higher --max-bad-states goes on"
        )
