"""Fill shards of a converted cache from the source's: copy states that stay, encode the others again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pipeline.cache.codecs import Statistics
from pipeline.cache.fidelity import TEACHER_TV, Measured, checked_rows, measure_rows, relative_error
from pipeline.cache.layout import LAST_HIDDEN, part_name
from pipeline.cache.manifest import Identity
from pipeline.cache.shard import ShardBuffer
from pipeline.cache.statistics import state_codecs

if TYPE_CHECKING:
    from pipeline.cache.tools.source import Source

# Rows decoded and encoded at a time.
ROWS = 2048


class Filler:
    """Fills shard buffers of a new identity from the source's shards."""

    def __init__(self, old: Source, identity: Identity, statistics: Mapping[str, Statistics]):
        self._old, self._identity = old, identity
        self._skipped_rows = old.skipped_rows(identity.features)
        self._codecs = state_codecs(identity, statistics)
        self._kept = {
            state
            for state, bound in self._codecs.items()
            if bound.codec == old.codecs[state].codec
            and _same(statistics.get(state), old.statistics.get(state))
        }
        self._head = old.head() if LAST_HIDDEN in self._codecs.keys() - self._kept else torch.empty(0)

    @torch.no_grad()
    def fill(self, buffer: ShardBuffer, shard: int) -> Measured:
        """Fill `buffer` and return the errors of a few rows of `last_hidden`, measured as in a capture.

        Raises:
            CacheError: the source's shard is damaged, or a value does not fit the codec.
        """
        stored, new = self._old.shard(shard), buffer.tensors
        for name in ("input_ids", "loss_mask"):
            new[name].copy_(stored[name])
        last_rows = self._old.last_rows_of(shard, self._identity.features)
        among = np.searchsorted(self._old.last_rows_of(shard, self._old.identity.features), last_rows)
        skipped = [rows for _, *rows in self._skipped_rows.of(shard)]
        features = self._identity.features
        checked = checked_rows(self._old.last_rows_by_sample(shard, features), features)
        checked = [row for row in checked if not any(s.start <= row < s.stop for _, s in skipped)]
        compared_context = self._old.context_rows_of(shard)[last_rows[checked]]
        measured: Measured = {}
        for state in self._codecs:
            of_last = state == LAST_HIDDEN
            # Rows of the source's tensor, by the rows of this one.
            rows = (
                torch.from_numpy(among)
                if of_last
                else torch.arange(self._old.manifest.plan[shard].context_rows)
            )
            blank = [last if of_last else context for context, last in skipped]
            self._fill_state(state, new, shard, rows, blank)
            compared = torch.tensor(checked if of_last else compared_context, dtype=torch.long)
            measured |= self._measure(state, new, shard, rows, compared)
        return measured

    def _names(self, state: str) -> dict[str, str]:
        """Return the names of a state's tensors by suffix."""
        suffixes = self._codecs[state].codec.specs(1, self._identity.target.hidden_size)
        return {suffix: part_name(state, suffix) for suffix in suffixes}

    def _fill_state(
        self, state: str, new: Mapping[str, Tensor], shard: int, rows: Tensor, skipped: list[slice]
    ) -> None:
        """Fill the tensors of one state.

        Args:
            rows: row of the source's tensor for each row, `[n]`.
            skipped: rows of skipped samples, which stay zero bytes.
        """
        names, stored = self._names(state), self._old.shard(shard)
        good = torch.ones(len(rows), dtype=torch.bool)
        for blank in skipped:
            good[blank] = False
        for part in (slice(start, start + ROWS) for start in range(0, len(rows), ROWS)):
            if state in self._kept:
                for name in names.values():
                    new[name][part] = stored[name][rows[part]]
                continue
            own = self._old.decode(shard, state, rows[part])
            own[~good[part]] = 0  # no codec refuses a zero
            for suffix, encoded in self._codecs[state].encode(own).items():
                new[names[suffix]][part] = encoded
        for blank in skipped:
            for name in names.values():
                new[name][blank].view(torch.uint8).zero_()

    def _measure(
        self, state: str, new: Mapping[str, Tensor], shard: int, rows: Tensor, checked: Tensor
    ) -> Measured:
        """Return the errors of the rows `checked` of a state, none for one that was copied.

        Args:
            rows: as for `_fill_state`.
        """
        if state in self._kept:
            figures = [relative_error(state)] + [TEACHER_TV] * (state == LAST_HIDDEN)
            return dict.fromkeys(figures, (0.0,) * len(checked))
        if not len(checked):
            return {}
        own = self._old.decode(shard, state, rows[checked])
        parts = {suffix: new[name][checked] for suffix, name in self._names(state).items()}
        values = measure_rows(state, self._codecs[state], own, parts, self._head, self._identity)
        return {what: tuple(value.tolist()) for what, value in values.items()}


def _same(one: Statistics | None, other: Statistics | None) -> bool:
    """Return whether two states have equal statistics, or both have none."""
    if one is None or other is None:
        return one is other
    return torch.equal(one.mean, other.mean) and torch.equal(one.deviation, other.deviation)
