"""Compare what shards hold with the index: tokens, masks, shared rows, and samples that are skipped."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.cache.index import count_candidates, sample_id, sample_ids
from pipeline.cache.manifest import Manifest
from pipeline.cache.prefixes import ContextRows
from pipeline.cache.skipped import ByReason, SkippedRows, state_rows


class SampleChecks:
    """Compares the tokens in shards with the index, and the states of skipped samples with zeros."""

    def __init__(self, manifest: Manifest, table: pa.Table, skipped: Mapping[int, ByReason]):
        features = manifest.identity.features
        self._skipped = SkippedRows(skipped, manifest.plan.samples, table, features)
        self._context = ContextRows.of(table, manifest.plan.samples)
        samples = np.array(manifest.plan.samples, dtype=np.int64)
        self._ends = np.cumsum(samples)
        self._first = self._ends - samples
        self._ids = sample_ids(table)
        self._start, self._length, self._labels, self._candidates = (
            table[name].to_numpy() for name in ("token_start", "length", "last_rows", "candidates")
        )

    def problem(self, shard: int, input_ids: np.ndarray, loss_mask: np.ndarray) -> str | None:
        """Return the problem with a shard's tokens `[T]` and mask `[T]`, if any."""
        for i in range(int(self._first[shard]), int(self._ends[shard])):
            rows = slice(int(self._start[i]), int(self._start[i]) + int(self._length[i]))
            ids, mask = input_ids[rows], loss_mask[rows]
            if sample_id(ids, mask) != self._ids[i].tobytes():
                return f"sample {i} has other tokens than its id says"
            if (int(mask[1:].sum()), count_candidates(mask)) != (self._labels[i], self._candidates[i]):
                return f"sample {i} has a loss mask that contradicts the index"
            shared = self._context.shared(i)
            before = rows.start - int(self._length[i - 1])
            if shared and not np.array_equal(ids[:shared], input_ids[before : before + shared]):
                return f"sample {i} shares rows with one that begins with other tokens"
        return None

    def not_blank(self, shard: int, tensors: Mapping[str, Tensor]) -> str | None:
        """Return the problem with the states of a shard's skipped samples, if any byte of them is not 0."""
        for i, context, last in self._skipped.of(shard):
            for name, rows in state_rows(tensors, context, last):
                if rows.view(torch.uint8).any():
                    return f"sample {i} is skipped, and its {name} is not zero bytes"
        return None
