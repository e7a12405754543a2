"""Batches whose samples begin alike: the target reads the beginning once, and carries on from there."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from capture.data.conversations import TokenizedSample
from capture.engines.engine import States
from capture.prefixes import equal_start, usable
from capture.target import HFDSparkTargetModel
from pipeline.hooks import input_device
from pipeline.rope import RopeLengths

# Layers of a cache that hold keys and values of a beginning, and nothing that a longer sample would change.
_ATTENTION = (DynamicLayer, DynamicSlidingWindowLayer)


@dataclass(frozen=True)
class _Beginning:
    """A beginning as the target read it."""

    tokens: np.ndarray
    states: dict[int | str, Tensor]
    """`[1, P, H]` each."""
    past: Cache


class Beginnings:
    """Runs batches from the beginning that their samples have in common.

    Args:
        target: the target, in this process.
        batch_tokens: maximum tokens of a forward of whole samples, where the target can't carry on.
        rope: lengths between which the target's RoPE changes.
    """

    def __init__(self, target: HFDSparkTargetModel, batch_tokens: int, rope: RopeLengths):
        self._target, self._batch_tokens, self._rope = target, batch_tokens, rope
        self._last: _Beginning | None = None
        self.carried = False
        """True if the last batch was read from a beginning on."""
        self.carries_on = True
        """False once the target was seen to keep other things than keys and values."""

    def common(self, batch: Sequence[TokenizedSample]) -> int:
        """Return how many first tokens of a batch are read once: 0 for none.

        It depends on the batch alone, so that a shard has the same bytes whenever it is captured.
        """
        first = batch[0].input_ids
        alike = min((equal_start(first, sample.input_ids) for sample in batch[1:]), default=0)
        shortest = min(len(sample.input_ids) for sample in batch)
        longest = max(len(sample.input_ids) for sample in batch)
        common = usable(min(alike, shortest - 1))
        groups = self._rope.groups(np.array([common, longest]))
        return common if groups[0] == groups[1] else 0

    def states(self, batch: Sequence[TokenizedSample]) -> States | None:
        """Return the states of a batch; None if it has no beginning that could be read once."""
        try:
            return self._states(batch)
        except (RuntimeError, MemoryError):
            self._last = None  # it may be what the rest does not fit beside
            raise

    def _states(self, batch: Sequence[TokenizedSample]) -> States | None:
        common = self.common(batch)
        beginning = self._read(batch[0].input_ids[:common]) if common and self.carries_on else None
        self.carried = beginning is not None
        if beginning is None:
            self._last = None  # its memory is this batch's
            return None
        past = copy.deepcopy(beginning.past)
        past.batch_repeat_interleave(len(batch))
        rest = padded([sample.input_ids[common:] for sample in batch], input_device(self._target.model))
        states = self._target.states(rest, past=past)
        places = []
        for row, sample in enumerate(batch):
            start = common + row * rest.shape[1]
            own = np.arange(start, start + len(sample.input_ids) - common)
            places.append(np.concatenate([np.arange(common), own]))
        joined = {
            key: torch.cat([beginning.states[key][0], rows.flatten(0, 1)]) for key, rows in states.items()
        }
        return States(joined, np.concatenate(places))

    def parts(self, batch: Sequence[TokenizedSample]) -> list[Sequence[TokenizedSample]]:
        """Cut a batch into those that a forward of whole samples can have."""
        found: list[list[TokenizedSample]] = []
        longest = 0
        for sample in batch:
            longest = max(longest, len(sample.input_ids))
            if not found or (len(found[-1]) + 1) * longest > self._batch_tokens:
                found.append([])
                longest = len(sample.input_ids)
            found[-1].append(sample)
        return found

    def _read(self, tokens: np.ndarray) -> _Beginning | None:
        """Return a beginning, read now unless it was the last one; None if the target can't carry on."""
        if self._last is None or not np.array_equal(self._last.tokens, tokens):
            self._last = None  # frees its memory first
            past = DynamicCache(config=self._target.config)
            rows = padded([tokens], input_device(self._target.model))
            try:
                states = self._target.states(rows, past=past)
            except TypeError:  # its decoder takes no cache
                self.carries_on = False
                return None
            kept = all(type(layer) in _ATTENTION for layer in past.layers)
            self.carries_on = kept and past.get_seq_length() == len(tokens)
            if self.carries_on:
                self._last = _Beginning(tokens, states, past)
        return self._last


def padded(rows: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """Right-pad rows of token ids to `[B, S]` on `device`."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long, pin_memory=device.type == "cuda")
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = torch.from_numpy(tokens)
    return ids.to(device, non_blocking=True)
