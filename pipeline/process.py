"""Which process is this, and does that one still live: the same answer for everyone who asks."""

from __future__ import annotations

import hashlib
import os
import socket
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@cache
def place() -> str:
    """Names the space in which process ids mean something: one boot of a machine, one PID namespace.

    Two containers of one machine, or one machine before and after a reboot, are different places.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:  # not Linux
        boot, namespace = socket.gethostname(), ""
    return hashlib.sha256(f"{boot} {namespace}".encode()).hexdigest()[:12]


def started(pid: int) -> str | None:
    """When a process of this place began, in the kernel's own count; None where that can't be told."""
    return _stat(pid, 19)


def _stat(pid: int, field: int) -> str | None:
    """A field of what the kernel says of a process after its name; None where it says nothing."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[field]
    except (OSError, IndexError):
        return None


def alive(pid: int, since: str | None = None) -> bool:
    """Whether a process of this place lives: the one that began at `since`, where that is known."""
    if pid < 1:  # not a process but a group of them
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's process is a process
        pass
    if _stat(pid, 0) in ("Z", "X"):  # dead, and kept by a parent that does not ask, as in many containers
        return False
    return since is None or started(pid) in (None, since)


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


def torchrun_place() -> WorkerPlace:
    """Which of torchrun's processes this is, by its environment; the only one where there is no torchrun."""
    try:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local = int(os.environ.get("LOCAL_RANK", rank))
    except (KeyError, ValueError):
        return WorkerPlace()
    return WorkerPlace(rank, world, local) if 0 <= rank < world else WorkerPlace()
