"""The folder through which states pass from an engine's process to this one: in memory, if there is room."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from pipeline.errors import TargetError
from pipeline.process import alive, place
from pipeline.text import size

_PREFIX = "dspark-states"
_MEMORY = Path("/dev/shm")
# Maximum bytes of states between an engine and its reader.
MAX_BYTES = 4 * 2**30


def states_folder(largest: int) -> tuple[Path, int]:
    """Make a folder, and remove those of processes that died.

    Args:
        largest: bytes of the largest sample's states.

    Returns:
        The folder, in /dev/shm or else among temporary files, and the maximum of bytes that it should hold.

    Raises:
        TargetError: neither has room for the largest sample.
    """
    rooms = {}
    for parent in dict.fromkeys((_MEMORY, Path(tempfile.gettempdir()))):
        if parent.is_dir() and os.access(parent, os.W_OK):
            _remove_old(parent)
            free = rooms[parent] = shutil.disk_usage(parent).free
            if free >= 2 * largest:
                name = f"{_PREFIX}-{place()}-{os.getpid()}-"
                return Path(tempfile.mkdtemp(prefix=name, dir=parent)), max(
                    largest, min(MAX_BYTES, free // 4)
                )
    found = ", ".join(f"{parent} has {size(free)}" for parent, free in rooms.items())
    raise TargetError(
        f"the states of the longest sample need {size(2 * largest)} on their way from vLLM, {found}: free "
        "some, set TMPDIR to a larger disk, or lower --max-length"
    )


def _remove_old(parent: Path) -> None:
    for folder in parent.glob(f"{_PREFIX}-{place()}-*"):
        pid = folder.name.split("-")[3]
        if pid.isdecimal() and not alive(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)
