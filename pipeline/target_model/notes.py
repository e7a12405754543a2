"""Lines on stderr while a target is opened and loaded. Under torchrun, the first process says them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable

from pipeline.process import torchrun_place

_NAMED = 3


def few(names: Iterable[str]) -> str:
    """Return the first names of many, in order."""
    ordered = sorted(names)
    return ", ".join([*ordered[:_NAMED], *(["..."] if len(ordered) > _NAMED else [])])


def waiting(line: str) -> None:
    """Say what takes so long, in a terminal and in the log of a batch job alike."""
    if torchrun_place().rank == 0:
        print(line, file=sys.stderr, flush=True)


@functools.cache
def warn_once(line: str) -> None:
    """Print a warning, once per process."""
    if torchrun_place().rank == 0:
        print(f"warning: {line}", file=sys.stderr, flush=True)
