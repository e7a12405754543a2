"""Chrome trace of a few training steps."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from pipeline.errors import UsageError

# Steps left out before the trace, fewer in a short run: they compile and allocate.
SKIPPED = 5


class _NoProfiler:
    def step(self) -> None:
        """Do nothing."""


def check_profile(steps: int, total_steps: int) -> None:
    """Raise UsageError if a run with `total_steps` left to train is too short to trace `steps` of them."""
    if steps >= total_steps:
        raise UsageError(
            f"--profile {steps} is too large: {total_steps} steps are left to train, so pass at most "
            f"{max(total_steps - 1, 0)}"
        )


def step_profiler(steps: int, total_steps: int, path: Path) -> profile | _NoProfiler:
    """Return a profiler. Call its `step` after each step; after tracing `steps` of them it writes `path`."""
    if steps == 0:
        return _NoProfiler()
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    skipped = min(SKIPPED, total_steps - steps)
    tracer = profile(
        activities=activities,
        schedule=schedule(wait=skipped - 1, warmup=1, active=steps, repeat=1),
        on_trace_ready=lambda done: done.export_chrome_trace(str(path)),
    )
    tracer.start()
    return tracer
