"""Bad samples: their states can't be used, or the target can't compute them here. See --bad-states."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence

import pyarrow as pa

from capture.console import note
from capture.engines.checks import problem
from pipeline.cache.skipped import REASONS, TOO_SHORT
from pipeline.errors import TargetError

# Samples of one reason that are named one by one: while the capture runs, and where there are too many.
MAX_NAMED = 5


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
        if reason == TOO_SHORT:  # nobody's fault
            return
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
            known = self._reasons if reasons is None else reasons
            reasons = {number: why for number, why in known.items() if why != TOO_SHORT}
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
