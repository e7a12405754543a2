"""The rows of `last_hidden`: which tokens of a sample have one, and the columns that place them.

Plan and index count label rows in every cache. Only this module knows which rows a cache's shards have.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pipeline.cache.features import ALL_TOKENS, LABELS, FeatureIdentity


class Columns(NamedTuple):
    """Names of the columns that place the rows of `last_hidden`."""

    start: str
    """Column of the index with the first row of each sample."""
    number: str
    """Column of the index with the number of rows of each sample."""
    total: str
    """Column of the plan with the number of rows of each shard."""


_COLUMNS = {
    LABELS: Columns("last_start", "last_rows", "last_rows"),
    ALL_TOKENS: Columns("token_start", "length", "tokens"),
}


def last_hidden_columns(features: FeatureIdentity) -> Columns:
    """Return the columns that place the rows of `last_hidden` in the shards of a cache."""
    return _COLUMNS[features.hidden]


def last_hidden_rows(loss_mask: np.ndarray) -> np.ndarray:
    """Return the label rows, whose last hidden state a loss can use: t-1 per supervised label t >= 1."""
    return np.flatnonzero(loss_mask[1:])


def stored_rows(loss_mask: np.ndarray, features: FeatureIdentity) -> np.ndarray:
    """Return the positions of a sample whose last hidden state is stored, in order."""
    return np.arange(len(loss_mask)) if features.hidden == ALL_TOKENS else last_hidden_rows(loss_mask)


def slices_of(
    loss_mask: np.ndarray,
    wanted: FeatureIdentity,
    stored: FeatureIdentity,
    rows: slice = slice(None),
) -> list[slice]:
    """Return where a sample's rows of `last_hidden` lie among those of another cache, as slices in order.

    Args:
        wanted: features of the rows: those of `stored`, or label rows.
        stored: features of the rows among which they lie.
        rows: some of the rows, counted from 0.
    """
    return [rows] if wanted.hidden == stored.hidden else runs(stored_rows(loss_mask, wanted)[rows])


def runs(positions: np.ndarray) -> list[slice]:
    """Return ascending positions `[M]` as slices of consecutive ones."""
    breaks = np.flatnonzero(np.diff(positions) != 1) + 1
    return [slice(int(run[0]), int(run[-1]) + 1) for run in np.split(positions, breaks) if len(run)]
