"""Measure a target's states on a few samples of the plan, so that codecs can standardise them."""

from __future__ import annotations

from collections.abc import Container, Mapping

import numpy as np
import torch
from torch import Tensor

from capture.data.conversations import TokenizedSample
from capture.data.tokens import TokenizedData
from capture.engines.checks import peaks_reason, problem, row_peaks
from capture.engines.engine import CaptureEngine
from capture.shards.bad import BadSamples
from pipeline.cache import FeatureIdentity, Identity
from pipeline.cache.codecs import Statistics
from pipeline.cache.layout import LAST_HIDDEN, context_name
from pipeline.cache.rows import stored_rows
from pipeline.cache.skipped import TOO_LARGE
from pipeline.cache.statistics import TOKENS, StateStatistics, chosen_samples, standardised_states
from pipeline.device import if_it_fits
from pipeline.errors import TargetError


@torch.no_grad()
def measure_statistics(
    engine: CaptureEngine,
    identity: Identity,
    data: TokenizedData,
    order: np.ndarray,
    bad: BadSamples | None = None,
) -> dict[str, Statistics]:
    """Measure mean and deviation of each state that is standardised, without position 0.

    The first token of a row often has states hundreds of times larger than any other token's, in a few
    channels. One such token would decide a channel's deviation.

    Args:
        order: the data's number of the cache's i-th sample. It decides which samples are measured.
        bad: told of bad samples, which are passed over; None refuses them.

    Raises:
        TargetError: a bad sample that is not to be skipped, or nothing else.
    """
    wanted, features = standardised_states(identity), identity.features
    if not wanted:
        return {}
    sums = {name: StateStatistics() for name in wanted}
    chosen, measured = chosen_samples(len(order)), 0
    for i in chosen:  # one at a time: it fits the memory if --batch-tokens fits
        sample = data[int(order[i])]
        sample = TokenizedSample(sample.source_row, sample.input_ids[:TOKENS], sample.loss_mask[:TOKENS])
        states = _states(engine, sample)
        if not isinstance(states, str) and not features.has_last_hidden:
            del states[LAST_HIDDEN]  # a row that is not stored is not bad
        reason, key = (states, None) if isinstance(states, str) else _verdict(states, sample, sums, features)
        if reason is not None:
            if bad is None:
                place = f"row {sample.source_row + 1} of the data"
                raise TargetError(problem(place, reason, key, len(sample.input_ids)))
            bad.found(i, reason, key)
            continue
        assert not isinstance(states, str)
        measured += 1
        for state, values in states.items():
            if _name(state) in sums:
                sums[_name(state)].add(values[1:])
    if not measured:
        raise TargetError(
            f"each of the {len(chosen)} samples that statistics are measured from is bad: check the target's "
            "weights, or try --dtype float32"
        )
    return {name: each.result() for name, each in sums.items()}


def _name(key: int | str) -> str:
    return LAST_HIDDEN if key == LAST_HIDDEN else context_name(int(key))


def _states(engine: CaptureEngine, sample: TokenizedSample) -> dict[int | str, Tensor] | str:
    """Return the states `[S, H]` of one sample; the reason if the target can't run it, tried twice."""
    for _ in range(2):
        states = if_it_fits(lambda: engine.states([sample]))
        if states is not None:
            return states.failed[0] if states.failed else states.take_all()
        torch.cuda.empty_cache()
    return TOO_LARGE


def _verdict(
    states: Mapping[int | str, Tensor],
    sample: TokenizedSample,
    measured: Container[str],
    features: FeatureIdentity,
) -> tuple[str | None, int | str | None]:
    """Return the reason why a sample is bad, and the state that shows it; None twice for a good one.

    Looked at are the rows that are stored, and those that are measured.
    """
    for key, rows in states.items():
        if key == LAST_HIDDEN and LAST_HIDDEN not in measured:
            labels = torch.from_numpy(stored_rows(sample.loss_mask, features)).to(rows.device)
            if not len(labels):  # the sample is cut before its first label
                continue
            rows = rows[labels]
        reason = peaks_reason(row_peaks(rows).cpu().numpy())
        if reason is not None:
            return reason, key
    return None, None
