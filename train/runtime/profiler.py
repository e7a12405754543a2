"""A Chrome trace of a few training steps."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from pipeline.errors import UsageError

# Steps before those that are traced: compilation and first allocations, if the run has so many.
SKIPPED = 5


class _NoProfiler:
    def step(self) -> None:
        """Nothing is traced."""


def check_profile(steps: int, total_steps: int) -> None:
    """Raises UsageError when so many steps of a run, or of what is left of it, can't be traced."""
    if steps >= total_steps:
        raise UsageError(
            f"--profile {steps}: there are {total_steps} steps to train, so at most {max(total_steps - 1, 0)}"
        )


def step_profiler(steps: int, total_steps: int, path: Path) -> profile | _NoProfiler:
    """A profiler whose `step` is called after each step; it writes `path` when it has traced `steps`."""
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
