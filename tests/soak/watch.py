"""Memory, open files and threads of processes, as /proc shows them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MIB = 2**20
EVERY_SECONDS = 0.25
BEGINNING_SECONDS = 4.0
"""Time that a process takes to load, which is left out where early and late are compared."""


@dataclass(frozen=True)
class Look:
    """One look at a process."""

    at: float
    """Seconds of a steady clock."""
    memory: int
    """Bytes of its own: resident and not of a file, so that a mapped shard does not count."""
    files: int
    threads: int


class Watch:
    """Looks at processes of one kind, such as the team's.

    Args:
        name: for people.
    """

    def __init__(self, name: str):
        self.name = name
        self.looks: list[Look] = []

    def look(self, pids: Sequence[int]) -> None:
        """Look at the processes; those that have ended are passed over."""
        now = time.monotonic()
        for pid in pids:
            found = _status(pid)
            if found is not None:
                self.looks.append(Look(now, *found))

    def quarters(self, what: str) -> tuple[float, float]:
        """Return the medians of a value in the first and the last quarter of the time, without its beginning.

        Args:
            what: a field of `Look`.
        """
        begun = self.looks[0].at + BEGINNING_SECONDS
        looks = [look for look in self.looks if look.at >= begun] or self.looks
        first, last = looks[0].at, looks[-1].at
        quarter = (last - first) / 4
        early = [getattr(look, what) for look in looks if look.at <= first + quarter]
        late = [getattr(look, what) for look in looks if look.at >= last - quarter]
        return statistics.median(early), statistics.median(late)

    def seconds(self) -> float:
        """Return the time between the first and the last look."""
        return self.looks[-1].at - self.looks[0].at if self.looks else 0.0

    def most(self, what: str) -> int:
        """Return the largest value ever seen."""
        return max(getattr(look, what) for look in self.looks)

    def lines(self) -> list[str]:
        """Return a line of figures per value."""
        found = []
        for what in ("memory", "files", "threads"):
            unit, sign = (MIB, " MiB") if what == "memory" else (1, "")
            early, late = (value / unit for value in self.quarters(what))
            most = f"at most {self.most(what) / unit:.0f}{sign}"
            found.append(
                f"{self.name}: {what} {most}; first quarter {early:.0f}{sign}, last quarter {late:.0f}{sign}"
            )
        return found

    def check(self, *, memory: int, files: int, threads: int, growth: int | None = None) -> None:
        """Assert that nothing grows without end.

        Args:
            memory: maximum bytes of a process.
            files: maximum number of open files.
            threads: maximum number of threads.
            growth: maximum bytes from the first to the last quarter; None: many short processes.
        """
        assert len(self.looks) >= 8, f"{self.name}: too few looks to judge"
        for what, limit in (("memory", memory), ("files", files), ("threads", threads)):
            assert self.most(what) <= limit, (
                f"{self.name}: {what} {self.most(what):,}, at most {limit:,} expected"
            )
        for what, limit in () if growth is None else (("memory", growth), ("files", 4), ("threads", 4)):
            early, late = self.quarters(what)
            assert late - early <= limit, f"{self.name}: {what} grows from {early:,.0f} to {late:,.0f}"


def _status(pid: int) -> tuple[int, int, int] | None:
    """Return memory, open files and threads of a process; None if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        values = dict(line.split(":", 1) for line in lines if ":" in line)
        files = sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
        return int(values["RssAnon"].split()[0]) * 1024, files, int(values["Threads"])
    except (OSError, KeyError):  # the last one: a process that has ended and was not waited for
        return None


def workers_of(folder: Path) -> list[int]:
    """Return the living processes that tokenise into `folder`, which are started anew, not forked."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command, variables = ((path / name).read_bytes() for name in ("cmdline", "environ"))
        except OSError:
            continue
        if b"spawn_main" in command and f"DSPARK_TOKENS={folder}".encode() in variables.split(b"\0"):
            found.append(int(path.name))
    return found
