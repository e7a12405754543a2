"""Seconds that work takes on the GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

WARM_UP, ROUNDS = 3, 15


def seconds_of(work: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Return the median seconds of a call, from its start until the GPU has finished."""
    import torch

    times = []
    for _ in range(WARM_UP + rounds):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[WARM_UP:])
