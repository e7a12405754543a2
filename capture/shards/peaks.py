"""The largest absolute value of each row of a shard's samples, by which bad ones are found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from capture.engines.checks import peaks_reason
from pipeline.cache.skipped import FAILED, TOO_LARGE

# In place of the largest value of rows that the target could not compute.
_LOST = {TOO_LARGE: -1.0, FAILED: -2.0}


class ContextPeaks:
    """Completes the peaks of a state's rows by those that samples share with the one before.

    Args:
        lengths: tokens of each sample of the shard.
        shared: first tokens that each shares with the one before.
        failed: reasons of samples that the target could not run, by number.
        beginnings: peaks by state of their first own rows, where these were computed for the samples after.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        shared: Sequence[int],
        failed: Mapping[int, str],
        beginnings: Mapping[int, Mapping[int | str, Tensor]],
    ):
        self._lengths, self._shared, self._failed = lengths, shared, failed
        self._beginnings = beginnings
        self._last: dict[int | str, tuple[int, np.ndarray]] = {}

    def reason(self, key: int | str, sample: int, own: np.ndarray) -> str | None:
        """Return the reason to skip a sample, None for a good one. Call it for a state's samples in order.

        Args:
            own: peaks of the rows that the sample does not share with the one before.
        """
        done, before = self._last.get(key, (-1, np.empty(0, np.float32)))
        for i in range(done + 1, sample):  # they have no rows at all
            empty = np.zeros(self._lengths[i] - self._shared[i], np.float32)
            before = self._with(key, before, i, empty)
        whole = self._with(key, before, sample, own)
        self._last[key] = (sample, whole)
        for reason, mark in _LOST.items():
            if (whole == mark).any():
                return reason
        return peaks_reason(whole)

    def _with(self, key: int | str, before: np.ndarray, sample: int, own: np.ndarray) -> np.ndarray:
        lost = _LOST.get(self._failed.get(sample, ""))
        if lost is not None:
            own = np.full_like(own, lost)
            if sample in self._beginnings:
                found = self._beginnings[sample][key].numpy()
                own[: len(found)] = found
        return np.concatenate([before[: self._shared[sample]], own])
