"""Identity of this process, and liveness of others."""

from __future__ import annotations

import hashlib
import os
import socket
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@cache
def place() -> str:
    """Return an id of the space in which process ids are unique: one boot of a machine, one PID namespace.

    Two containers of one machine, or one machine before and after a reboot, are different places.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = str(Path("/proc/self/ns/pid").readlink())
    except OSError:  # not Linux
        boot, namespace = socket.gethostname(), ""
    return hashlib.sha256(f"{boot} {namespace}".encode()).hexdigest()[:12]


def started(pid: int) -> str | None:
    """Return the start time of a process of this place, in the kernel's count; None if unknown."""
    return _stat(pid, 19)


def _stat(pid: int, field: int) -> str | None:
    """Return a field after the name in `/proc/<pid>/stat`, counted from 0; None if unknown."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[field]
    except (OSError, IndexError):
        return None


def alive(pid: int, since: str | None = None) -> bool:
    """Return whether a process of this place is alive and, if `since` is known, started then."""
    if pid < 1:  # a group of processes
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # alive, of another user
        pass
    if _stat(pid, 0) in ("Z", "X"):  # dead, but not reaped by its parent, as in many containers
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
        """Name for messages, such as 1/4; empty for a single process."""
        return f"{self.rank}/{self.world}" if self.world > 1 else ""

    def device(self, name: str) -> str:
        """Return this process's own GPU for `auto` or `cuda`, if there are several processes; else `name`."""
        if name not in ("auto", "cuda") or self.world == 1:
            return name
        import torch

        count = torch.cuda.device_count()
        return f"cuda:{self.local_rank % count}" if count else name


def torchrun_place() -> WorkerPlace:
    """Return this process's place among torchrun's, from its environment; without torchrun, a single one."""
    try:
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        local = int(os.environ.get("LOCAL_RANK", rank))
    except (KeyError, ValueError):
        return WorkerPlace()
    return WorkerPlace(rank, world, local) if 0 <= rank < world else WorkerPlace()
