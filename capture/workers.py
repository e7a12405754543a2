"""Number of this process among those that capture together.

Only speed depends on it: the plan says what every shard holds, and claims keep two processes from capturing
the same shard (see `pipeline.cache.progress.claims`).
"""

from __future__ import annotations

from capture.engines.options import EngineOptions
from pipeline.errors import UsageError
from pipeline.process import WorkerPlace, torchrun_place


def worker_place(text: str | None, engine: EngineOptions = EngineOptions()) -> WorkerPlace:  # noqa: B008
    """Return the place from `--worker I/N`, else from torchrun's environment.

    Args:
        engine: an engine that takes all of torchrun's processes for one target makes them one worker.

    Raises:
        UsageError: the text has another form, or I is not below N.
    """
    if text is None:
        return WorkerPlace() if engine.is_split else torchrun_place()
    rank, sign, world = text.partition("/")
    if not (sign and rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise UsageError(f"expected --worker I/N with I from 0 to N-1, such as 0/4, got {text!r}")
    return WorkerPlace(int(rank), int(world), int(rank))
