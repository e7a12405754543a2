"""Notes of the pretend device: host synchronisations, contexts, faults, each by the lines that caused it."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).parents[3]
_OWN = str(Path(__file__).parent)
_LIBRARIES = "site-packages"
# Lines of a chain that are kept: the innermost, which say where, and those around them, which say when.
DEPTH = 24


@dataclass(frozen=True)
class Note:
    """Something that happened, and where."""

    what: str
    """Such as `item`, or `copy to the host`."""
    device: int
    """Number of the GPU."""
    lines: tuple[str, ...]
    """This project's frames, innermost first, as `train/losses/slots.py:12 sum_slots`."""
    library: str = ""
    """The library's line that the innermost frame called, if it was not torch itself."""
    thread: str = ""
    """Name of the thread; empty for the main one."""

    def __str__(self) -> str:
        where = " < ".join(self.lines[:3]) or "no line of this project"
        library = f" via {self.library}" if self.library else ""
        thread = f" in thread {self.thread}" if self.thread else ""
        return f"{self.what} on cuda:{self.device}{thread}: {where}{library}"


class Ledger:
    """Counts of notes, by kind. Safe to use from several threads."""

    def __init__(self) -> None:
        self.syncs: Counter[Note] = Counter()
        """Times that the host waited for a GPU."""
        self.contexts: Counter[Note] = Counter()
        """Calls that open a context on a GPU that has none yet."""
        self.faults: Counter[Note] = Counter()
        """Races, and use of memory that is not there any more."""
        self._lock = threading.Lock()

    def sync(self, what: str, device: int) -> None:
        """Count a wait of the host."""
        self._add(self.syncs, what, device)

    def context(self, what: str, device: int) -> None:
        """Count a call that opens a context."""
        self._add(self.contexts, what, device)

    def fault(self, what: str, device: int) -> None:
        """Count a fault that a GPU would not report."""
        self._add(self.faults, what, device)

    def take(self) -> dict[str, Counter[Note]]:
        """Return all counts, and begin anew."""
        with self._lock:
            taken = {"syncs": self.syncs, "contexts": self.contexts, "faults": self.faults}
            self.syncs, self.contexts, self.faults = Counter(), Counter(), Counter()
        return taken

    def _add(self, counts: Counter[Note], what: str, device: int) -> None:
        lines, library = here()
        name = threading.current_thread().name
        thread = "" if threading.current_thread() is threading.main_thread() else name
        with self._lock:
            counts[Note(what, device, lines, library, thread)] += 1


def here() -> tuple[tuple[str, ...], str]:
    """Return this project's frames, innermost first, and the library's line that the innermost called."""
    lines: list[str] = []
    library = ""
    for frame in _frames():
        path = frame.f_code.co_filename
        if path.startswith(_OWN):
            continue
        if path.startswith(str(ROOT)) and _LIBRARIES not in path:
            name = Path(path).relative_to(ROOT).as_posix()
            lines.append(f"{name}:{frame.f_lineno} {frame.f_code.co_qualname}")
            if len(lines) == DEPTH:
                break
        elif not lines and not library and _LIBRARIES in path:
            short = path.rpartition(f"{_LIBRARIES}/")[2]
            library = "" if short.startswith("torch/") else f"{short}:{frame.f_lineno}"
    return tuple(lines), library


def _frames() -> Iterator[FrameType]:
    frame = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


LEDGER = Ledger()
