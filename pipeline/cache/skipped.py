"""Skipped samples: each keeps its place in plan, index and shard, and no reader returns it. See FORMAT.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
from torch import Tensor

from pipeline.cache.features import FeatureIdentity
from pipeline.cache.prefixes import ContextRows
from pipeline.cache.rows import last_hidden_columns
from pipeline.errors import CacheError, ConfigError

NOT_FINITE, ALL_ZERO = "states not finite", "states all zero"
TOO_LARGE, FAILED = "does not fit the device", "fails in the engine"
TOO_SHORT = "answered in fewer than two tokens"
REASONS = (FAILED, TOO_SHORT, NOT_FINITE, ALL_ZERO, TOO_LARGE)
"""Every reason that a sample can be skipped for, the gravest one first."""

# A shard's skipped samples as a record holds them: by reason, their numbers in the shard from 0.
ByReason = Mapping[str, Sequence[int]]


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """The skipped samples of a cache, as columns in the order of the index."""

    sample: tuple[int, ...] = ()
    """Row of the index."""
    source: tuple[int, ...] = ()
    source_row: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    last_rows: tuple[int, ...] = ()
    reason: tuple[str, ...] = ()
    """One of `REASONS`."""

    def __post_init__(self) -> None:
        if len({len(getattr(self, field.name)) for field in fields(self)}) > 1:
            raise ConfigError("expected columns of equal length")
        if any(a >= b for a, b in zip(self.sample, self.sample[1:], strict=False)):
            raise ConfigError("expected increasing sample numbers")
        if not set(self.reason) <= set(REASONS):
            raise ConfigError(f"expected reasons among {', '.join(REASONS)}")

    def __len__(self) -> int:
        return len(self.sample)

    def counts(self) -> dict[str, int]:
        """Return the number of samples per reason, without reasons of none."""
        return {reason: self.reason.count(reason) for reason in REASONS if reason in self.reason}

    def kept(self, number: int) -> np.ndarray:
        """Return which of the `number` samples of the index are not skipped, `[number]` bool."""
        kept = np.ones(number, dtype=bool)
        kept[list(self.sample)] = False
        return kept

    def by_shard(self, samples: Sequence[int]) -> dict[int, dict[str, list[int]]]:
        """Return the skipped samples of each shard that has any, as a record holds them.

        Args:
            samples: the plan's column.
        """
        ends = np.cumsum(np.array(samples, dtype=np.int64))
        shards = np.searchsorted(ends, np.array(self.sample, dtype=np.int64), side="right")
        found: dict[int, dict[str, list[int]]] = {}
        for shard, number, reason in zip(shards.tolist(), self.sample, self.reason, strict=True):
            local = number - int(ends[shard]) + samples[shard]
            found.setdefault(shard, {}).setdefault(reason, []).append(local)
        return found

    def differs_from(self, table: pa.Table) -> bool:
        """Return whether a column contradicts the index."""
        rows = np.array(self.sample, dtype=np.int64)
        if len(rows) and not 0 <= rows[0] <= rows[-1] < len(table):
            return True
        pairs = (("source", self.source), ("source_row", self.source_row))
        pairs += (("length", self.tokens), ("last_rows", self.last_rows))
        return any(tuple(table[name].to_numpy()[rows].tolist()) != column for name, column in pairs)


def skipped_samples(reasons: Mapping[int, str], table: pa.Table) -> Skipped:
    """Return the columns of skipped samples.

    Args:
        reasons: by the sample's row of the index.
        table: the index.
    """
    numbers = sorted(reasons)
    rows = np.array(numbers, dtype=np.int64)
    source, row, tokens, last = (
        tuple(table[name].to_numpy()[rows].tolist())
        for name in ("source", "source_row", "length", "last_rows")
    )
    return Skipped(
        sample=tuple(numbers),
        source=source,
        source_row=row,
        tokens=tokens,
        last_rows=last,
        reason=tuple(reasons[n] for n in numbers),
    )


def reasons_by_row(shards: Iterable[ByReason], samples: Sequence[int]) -> dict[int, str]:
    """Return the reason of each sample that shards skip, by its row of the index.

    Args:
        shards: the skipped samples of every shard, in order.
        samples: the plan's column.
    """
    found, first = {}, 0
    for skipped, count in zip(shards, samples, strict=True):
        for reason, numbers in skipped.items():
            found |= {first + number: reason for number in numbers}
        first += count
    return found


def impossible(skipped: Skipped, number: int) -> str | None:
    """Return why a complete cache of `number` samples in its plan can't skip these; None if it can."""
    if not len(skipped):
        return None
    if not 0 <= skipped.sample[0] <= skipped.sample[-1] < number:
        return "it skips a sample outside its plan"
    if len(skipped) == number:
        return "it skips every sample"
    columns = (skipped.source, skipped.source_row, skipped.tokens, skipped.last_rows)
    if any(min(column) < 0 or max(column) >= 2**63 for column in columns):
        return "a skipped sample with a number outside 0 to 2^63"
    return None


def is_possible(skipped: ByReason, samples: int) -> bool:
    """Return whether a record may name these samples of a shard of `samples` samples."""
    numbers = [n for column in skipped.values() for n in column]
    return (
        set(skipped) <= set(REASONS)
        and len(set(numbers)) == len(numbers)
        and all(0 <= n < samples for n in numbers)
        and all(len(column) and list(column) == sorted(column) for column in skipped.values())
    )


class SkippedRows:
    """Rows of skipped samples in the tensors of their shards.

    Args:
        skipped: of each shard that has any.
        samples: the plan's column.
        table: the index.
        features: the states in the shards.
    """

    def __init__(
        self,
        skipped: Mapping[int, ByReason],
        samples: Sequence[int],
        table: pa.Table,
        features: FeatureIdentity,
    ):
        self._skipped = skipped
        self._ends = np.cumsum(samples, dtype=np.int64)
        self._first = self._ends - samples
        self._context = ContextRows.of(table, samples)
        last = last_hidden_columns(features)
        self._columns = [table[name].to_numpy() for name in (last.start, last.number)]

    def of(self, shard: int) -> Iterator[tuple[int, slice, slice]]:
        """Yield each skipped sample of a shard: its row of the index, of its context, of its last hidden.

        Rows of context that it shares with a sample that is not skipped are left out.
        """
        first = int(self._first[shard])
        numbers = sorted(first + n for column in self._skipped.get(shard, {}).values() for n in column)
        if not numbers:
            return
        context = self._context.unused(range(first, int(self._ends[shard])), set(numbers))
        for i in numbers:
            start, rows = (int(column[i]) for column in self._columns)
            yield i, context[i], slice(start, start + rows)


def counted(rows: Mapping[str, int], skipped: Skipped) -> dict[str, int]:
    """Return the manifest's counts of source rows after samples of them were skipped."""
    found = dict(rows)
    if len(skipped):
        found["captured"] = found.get("captured", 0) - len(skipped)
        found |= {f"dropped: {reason}": n for reason, n in skipped.counts().items()}
    return found


def uncounted(rows: Mapping[str, int], skipped: Skipped) -> dict[str, int]:
    """Return the counts that `counted` was given."""
    found = dict(rows)
    for reason, n in skipped.counts().items():
        found.pop(f"dropped: {reason}", None)
        found["captured"] = found.get("captured", 0) + n
    return found


def state_rows(
    tensors: Mapping[str, Tensor], context: slice, last_rows: slice
) -> Iterator[tuple[str, Tensor]]:
    """Yield one sample's rows of every state tensor of its shard, as views, each with the tensor's name."""
    for name, tensor in tensors.items():
        if name not in ("input_ids", "loss_mask"):
            yield name, tensor[last_rows if name.partition(".")[0] == "last_hidden" else context]


def all_skipped(cache: Path, reasons: Mapping[int, str]) -> CacheError:
    """Return the error of a cache of which every sample is skipped, for these reasons."""
    counts = Counter(reasons.values())
    words = ", ".join(f"{counts[reason]:,} {reason}" for reason in REASONS if counts[reason])
    remedy = "raise --max-new-tokens" if TOO_SHORT in counts else "check the target"
    return CacheError(f"{cache} would hold no sample, of all {len(reasons):,}: {words}; {remedy}")
