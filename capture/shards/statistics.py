"""Measure a target's states on a few samples of the plan, so that codecs can standardise them."""

from __future__ import annotations

import numpy as np
import torch

from capture.data.conversations import TokenizedSample
from capture.data.tokens import TokenizedData
from capture.shards.fill import check_peaks, pad, row_peaks
from capture.target import HFDSparkTargetModel
from pipeline.cache import Identity
from pipeline.cache.codecs import Statistics
from pipeline.cache.layout import LAST_HIDDEN, context_name
from pipeline.cache.statistics import TOKENS, StateStatistics, chosen_samples, standardised_states
from pipeline.hooks import input_device


@torch.no_grad()
def measure_statistics(
    target: HFDSparkTargetModel, identity: Identity, data: TokenizedData, order: np.ndarray
) -> dict[str, Statistics]:
    """Measure mean and deviation of each state that is standardised, without position 0.

    The first token of a row often has states hundreds of times larger than any other token's, in a few
    channels. One such token would decide a channel's deviation.

    Args:
        order: the data's number of the cache's i-th sample. It alone decides which samples are measured.

    Raises:
        TargetError: a state holds NaN or infinity, or only zeros.
    """
    wanted = standardised_states(identity)
    if not wanted:
        return {}
    samples = [data[int(order[i])] for i in chosen_samples(len(order))]
    samples = [TokenizedSample(s.source_row, s.input_ids[:TOKENS], s.loss_mask[:TOKENS]) for s in samples]
    sums = {name: StateStatistics() for name in wanted}
    device = input_device(target.model)
    for sample in samples:  # one at a time: it fits the memory if --batch-tokens fits
        for key, values in target.states(pad([sample], device)).items():
            name = LAST_HIDDEN if key == LAST_HIDDEN else context_name(key)
            if name in sums:
                check_peaks(row_peaks(values[0]).cpu().numpy(), key, sample)
                sums[name].add(values[0, 1:])
    return {name: each.result() for name, each in sums.items()}
