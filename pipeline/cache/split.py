"""Training that a cache allows, known from its samples' ids and lengths: what is held out, how many steps.

The defaults of a run's `[train]` table that decide it are here, because a plan states them before a capture.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

EPOCHS = 10
BATCH_TOKENS = 4096
MICRO_BATCHES_PER_STEP = 128
HELD_OUT = 0.05
# With fewer optimiser steps a draft has hardly left its first weights.
FEW_STEPS = 100


def held_out(sample_ids: np.ndarray, fraction: float) -> np.ndarray:
    """Choose the held-out samples by the leading 32 bits of their ids `[n, 16]` uint8; return `[n]` bool.

    A sample is on the same side in every cache, whatever the order or the codecs.
    """
    return _leading(sample_ids) < fraction * 2**32


def kept_share(sample_ids: np.ndarray, fraction: float, share: float) -> np.ndarray:
    """Choose a share of the samples that are not held out, by their ids `[n, 16]` uint8; return `[n]` bool.

    The samples of a smaller share are among those of a larger one.

    Args:
        fraction: as in `held_out`.
        share: above 0 and at most 1; 1 keeps all.
    """
    first = fraction + (1 - fraction) * (1 - share)
    return _leading(sample_ids) >= first * 2**32


def _leading(sample_ids: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(sample_ids[:, :4]).view(">u4").squeeze(1)


def smallest_share(sample_ids: np.ndarray) -> float | None:
    """Return the smallest share that holds a sample out, rounded up; None if none leaves one to train on."""
    leading = _leading(sample_ids)
    if not len(leading):
        return None
    first = (int(leading.min()) + 1) / 2**32
    for digits in range(2, 12):
        scale = 10 ** (digits - 1 - math.floor(math.log10(first)))
        share = math.ceil(first * scale) / scale
        out = int((leading < share * 2**32).sum())
        if share < 1 and 0 < out < len(leading):
            return share
    return None


def held_out_problem(sample_ids: np.ndarray, fraction: float) -> str | None:
    """Return why a share can't split the samples `[n, 16]`, and what to do; None if it can."""
    count, out = len(sample_ids), int(held_out(sample_ids, fraction).sum())
    if out < count and (out or not fraction):
        return None
    side = "left to train on" if out else "held out"
    share = smallest_share(sample_ids)
    remedy = "capture more data" if share is None else f"the smallest share that works is {share:.12g}"
    return f"train.held_out = {fraction} leaves no sample {side} of the cache's {count:,}: {remedy}"


def few_steps(steps: int, remedy: str) -> str | None:
    """Return a warning if a run has few optimiser steps; None if it has enough.

    Args:
        remedy: what to change.
    """
    if steps >= FEW_STEPS:
        return None
    return f"fewer than {FEW_STEPS} optimiser steps, from which a draft hardly learns: {remedy}"


def more_steps(micro_batches: int, per_step: int) -> str:
    """Return what to change for `FEW_STEPS` optimiser steps or more.

    Args:
        micro_batches: micro-batches of the whole run.
        per_step: micro-batches of an optimiser step.
    """
    fewer = max(1, micro_batches // FEW_STEPS)
    smaller = f"lower train.micro_batches_per_step from {per_step:,} to {fewer:,}, "
    return f"{smaller if fewer < per_step else ''}raise train.epochs, or capture more data"


def training_lines(sample_ids: np.ndarray, lengths: np.ndarray) -> Iterator[str]:
    """Yield lines on the training that a capture allows with the default settings.

    The count of steps is as of full batches. Training packs whole samples and counts exactly.

    Args:
        sample_ids: `[n, 16]` uint8.
        lengths: tokens of each sample, `[n]`.
    """
    out = held_out(sample_ids, HELD_OUT)
    tokens = int(lengths[~out].sum(dtype=np.int64))
    batches = math.ceil(tokens / BATCH_TOKENS)
    each = max(1, math.ceil(batches / MICRO_BATCHES_PER_STEP))
    yield (
        f"training, if the run's config keeps the defaults: about {each * EPOCHS:,} optimiser steps, "
        f"{EPOCHS} epochs of about {each:,}; {int(out.sum()):,} samples held out"
    )
    remedy = more_steps(batches * EPOCHS, MICRO_BATCHES_PER_STEP)
    for problem in (few_steps(each * EPOCHS, remedy), held_out_problem(sample_ids, HELD_OUT)):
        if problem:
            yield f"warning: if the run's config keeps the defaults, {problem}"
