"""Interface of the engines that run the target for a capture, and the states that they return."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from capture.data.conversations import TokenizedSample
from pipeline.cache import Identity
from pipeline.cache.statistics import StateCodec
from pipeline.rope import RopeLengths


class States:
    """States of a batch's tokens, sample after sample without padding. Each is taken once, and then freed.

    Args:
        states: tensors by layer id, and by `"last_hidden"`, whose last two dimensions are rows and hidden
            size `[.., H]`; each may be on another device.
        places: the row of each token in such a tensor, whose rows are counted over all other dimensions;
            None if the rows are the tokens.
        failed: reasons, from `pipeline.cache.skipped.REASONS`, of samples that the target could not run, by
            their number in the batch. Their rows mean nothing.
    """

    def __init__(
        self,
        states: Mapping[int | str, Tensor],
        places: np.ndarray | None = None,
        failed: Mapping[int, str] | None = None,
    ):
        self._states, self._places = dict(states), places
        self.failed = dict(failed or {})
        self._every: Tensor | None = None
        """`places` on the device that they were needed on last."""

    def take(self, key: int | str, tokens: np.ndarray | None = None) -> Tensor:
        """Return and forget the states `[n, H]` of one key.

        Args:
            tokens: numbers of tokens among the batch's, increasing; None is all of them.
        """
        rows = self._states.pop(key).flatten(0, -2)
        if self._places is None:
            return rows if tokens is None else rows[on_device(tokens, rows.device)]
        if tokens is not None:
            return rows[on_device(self._places[tokens], rows.device)]
        if len(self._places) == len(rows):
            return rows
        if self._every is None:
            self._every = on_device(self._places, rows.device)
        self._every = self._every.to(rows.device)
        return rows[self._every]

    def take_all(self) -> dict[int | str, Tensor]:
        """Return the states `[n, H]` of every key that was not taken."""
        return {key: self.take(key) for key in tuple(self._states)}


class CaptureEngine(Protocol):
    """A frozen target at work. One is made per process, and closed at its end."""

    layer_ids: Sequence[int]
    """The layers whose states it returns beside the last hidden states."""
    embedding: Tensor
    """The target's token embedding `[V, H]`."""
    head: Tensor
    """The target's `lm_head.weight` `[V, H]`, on the device where states are compared with it."""
    device: torch.device
    """The device of rows of states, unless the target is spread over several."""
    while_waiting: Callable[[], None]
    """Called often while it waits for another process, and raises to stop. May be replaced."""
    leak: str
    """For a row whose states change with the batch: the likely reason, and what to do."""

    def expect(self, batches: Sequence[Sequence[TokenizedSample]]) -> None:
        """Say which batches `states` will be asked for next, in this order. An engine may begin with them."""

    def states(self, batch: Sequence[TokenizedSample]) -> States:
        """Run a batch and return the states of `layer_ids` and `"last_hidden"` at each of its tokens.

        Raises:
            TargetError: the target can't be run, or what it returned is not the states of these tokens.
            RuntimeError, MemoryError: the batch does not fit the memory, see `pipeline.device.out_of_memory`.
        """

    def prove(
        self,
        identity: Identity,
        samples: Sequence[TokenizedSample],
        last_codec: StateCodec | None,
        rope: RopeLengths,
    ) -> dict[str, float]:
        """Prove on samples that the states are the target's own. Return figures for the manifest.

        Args:
            last_codec: codec of last hidden states; None if they are not stored.
            rope: lengths that may not share a batch.

        Raises:
            TargetError: they are not.
        """

    def close(self) -> None:
        """End what the engine started."""


def on_device(numbers: np.ndarray, device: torch.device) -> Tensor:
    """Return row numbers as a tensor on a device, without waiting for a GPU."""
    index = torch.from_numpy(numbers.astype(np.int64))
    return index.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else index
