"""Fill shards of a converted cache from the source's: copy states that stay, encode the others again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from pipeline.cache.codecs import Statistics
from pipeline.cache.fidelity import TEACHER_TV, Measured, measure_rows, relative_error, spread
from pipeline.cache.layout import LAST_HIDDEN, part_name
from pipeline.cache.manifest import Identity
from pipeline.cache.shard import ShardBuffer
from pipeline.cache.statistics import state_codecs

if TYPE_CHECKING:
    from pipeline.cache.tools.convert import Source

# Rows decoded and encoded at a time.
ROWS = 2048


class Filler:
    """Fills shard buffers of a new identity from the source's shards."""

    def __init__(self, old: Source, identity: Identity, statistics: Mapping[str, Statistics]):
        self._old, self._identity = old, identity
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
        """Fill `buffer` and return the errors of a few label rows, measured as in a capture.

        Raises:
            CacheError: the source's shard is damaged, or a value does not fit the codec.
        """
        stored, new = self._old.shard(shard), buffer.tensors
        for name in ("input_ids", "loss_mask"):
            new[name].copy_(stored[name])
        labels = self._old.label_rows(shard)
        skipped = [rows for _, *rows in self._old.skipped_rows.of(shard)]
        checked = [row for row in spread(len(labels)) if not any(s.start <= row < s.stop for _, s in skipped)]
        checked = torch.tensor(checked, dtype=torch.long)
        measured: Measured = {}
        for state, bound in self._codecs.items():
            suffixes = bound.codec.specs(1, self._identity.target.hidden_size)
            names = {suffix: part_name(state, suffix) for suffix in suffixes}
            if state in self._kept:
                for name in names.values():
                    new[name].copy_(stored[name])
                figures = [relative_error(state)] + [TEACHER_TV] * (state == LAST_HIDDEN)
                measured |= dict.fromkeys(figures, (0.0,) * len(checked))
                continue
            good = torch.ones(len(new[names[""]]), dtype=torch.bool)
            for tokens, last in skipped:
                good[last if state == LAST_HIDDEN else tokens] = False
            for start in range(0, len(good), ROWS):
                part = slice(start, start + ROWS)
                own = self._old.decode(shard, state, part)
                own[~good[part]] = 0  # no codec refuses a zero
                for suffix, encoded in bound.encode(own).items():
                    new[names[suffix]][part] = encoded
            for tokens, last in skipped:
                for name in names.values():
                    new[name][last if state == LAST_HIDDEN else tokens].view(torch.uint8).zero_()
            if not len(checked):
                continue
            rows = checked if state == LAST_HIDDEN else labels[checked]
            own = self._old.decode(shard, state, rows)
            parts = {suffix: new[name][rows] for suffix, name in names.items()}
            values = measure_rows(state, bound, own, parts, self._head, self._identity)
            measured |= {what: tuple(value.tolist()) for what, value in values.items()}
        return measured


def _same(one: Statistics | None, other: Statistics | None) -> bool:
    """Return whether two states have equal statistics, or both have none."""
    if one is None or other is None:
        return one is other
    return torch.equal(one.mean, other.mean) and torch.equal(one.deviation, other.deviation)
