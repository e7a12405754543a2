"""Checks that any engine's states must pass: finite, and not all zero."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from capture.data.conversations import TokenizedSample
from pipeline.cache.layout import LAST_HIDDEN
from pipeline.cache.skipped import ALL_ZERO, FAILED, NOT_FINITE, TOO_LARGE
from pipeline.errors import TargetError

_PROBLEMS = {NOT_FINITE: "holds NaN or infinity", ALL_ZERO: "is all zero"}
_REMEDIES = {
    NOT_FINITE: "check the target's weights, or try --dtype float32",
    ALL_ZERO: "check the target's weights, or try --dtype float32",
    TOO_LARGE: "lower --max-length, or spread the target over more GPUs with --device-map auto",
    FAILED: "see the engine's log",
}


def row_peaks(rows: Tensor) -> Tensor:
    """Return the largest absolute value of each row `[n, H]`: `[n]` fp32, NaN for a row that holds one."""
    return rows.abs().amax(dim=1).float()


def peaks_reason(peaks: np.ndarray) -> str | None:
    """Return the reason to skip a sample, None for a good one, given the largest absolute value per row."""
    if not np.isfinite(peaks).all():
        return NOT_FINITE
    return None if peaks.any() else ALL_ZERO


def check_peaks(peaks: np.ndarray, key: int | str, sample: TokenizedSample) -> None:
    """Refuse a sample's states, given the largest absolute value of each row.

    Raises:
        TargetError: they hold NaN or infinity, or only zeros.
    """
    reason = peaks_reason(peaks)
    if reason is not None:
        place = f"row {sample.source_row + 1} of the data"
        raise TargetError(problem(place, reason, key, len(sample.input_ids)))


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
    elif reason == FAILED:
        what = f"the engine fails on the sample at {place}, {tokens:,} tokens, each time"
    else:
        what = (
            f"{state_name(LAST_HIDDEN if key is None else key)} of the sample at {place} {_PROBLEMS[reason]}"
        )
    return f"{what}: {_REMEDIES[reason]}{remedy}"
