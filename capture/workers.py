"""Which of several capturing processes this one is.

Nothing but speed depends on it: the plan says what every shard holds, and claims keep two processes from the
same one (see `pipeline.cache.claims`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from pipeline.errors import UsageError


@dataclass(frozen=True)
class WorkerPlace:
    """Number `rank` of `world` processes, counted from 0; `local_rank` on its machine."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @property
    def label(self) -> str:
        """For people; empty for a process alone."""
        return f"{self.rank}/{self.world}" if self.world > 1 else ""

    def device(self, name: str) -> str:
        """`auto` or `cuda` on a machine with several GPUs is one a process; all else stays as it is."""
        if name not in ("auto", "cuda") or self.world == 1:
            return name
        import torch

        count = torch.cuda.device_count()
        return f"cuda:{self.local_rank % count}" if count else name


def worker_place(text: str | None) -> WorkerPlace:
    """From `--worker I/N`, else from torchrun's environment.

    Raises:
        UsageError: not of that form, or I is not below N.
    """
    if text is None:
        try:
            rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
            local = int(os.environ.get("LOCAL_RANK", rank))
        except (KeyError, ValueError):
            return WorkerPlace()
        return WorkerPlace(rank, world, local) if 0 <= rank < world else WorkerPlace()
    rank, sign, world = text.partition("/")
    if not (sign and rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise UsageError(f"expected --worker I/N with I from 0 to N-1, such as 0/4, got {text!r}")
    return WorkerPlace(int(rank), int(world), int(rank))
