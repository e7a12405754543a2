"""Three processes of one capture, and what happens to them: kills, stops, pauses, a full disk."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from capture.shards import fill
from pipeline.cache import read_manifest
from pipeline.device import out_of_memory
from tests.processes import Dspark, finished_shards, one_thread
from tests.soak.target import ROOM_BYTES
from tests.soak.watch import EVERY_SECONDS, Watch

MEMBERS = 3
OLDEST_SECONDS = 6.0
"""Age at which a process meets its fate at the latest."""
PAUSE_SECONDS = (1.0, 8.0)
HANG_SECONDS = 180.0
"""Time without a finished shard after which the capture counts as hanging."""
FULL_FILE_BYTES = 48 * 1024
"""Maximum size of a file while the system refuses larger ones."""
OPEN_FILES = 1024
NO_ROOM = "an allocation was refused"
"""The words of a capture's process then."""
FATES = ("kill", "kill", "terminate", "interrupt", "pause", "pause and kill")


def usual() -> None:
    """Prepare any process: one thread, and as many open files as Linux usually allows."""
    one_thread()
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


def soaked() -> None:
    """Prepare a process of a capture: little memory, and a disk that is full while $DISK_FULL exists."""
    usual()
    status = Path("/proc/self/status").read_text()
    taken = int(status.split("VmData:")[1].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (taken + ROOM_BYTES, resource.RLIM_INFINITY))
    flag = Path(os.environ["DISK_FULL"])

    def refused(real: Callable) -> Callable:
        def call(*given, **options):
            if flag.exists():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return real(*given, **options)

        return call

    for name in ("fsync", "replace"):
        setattr(os, name, refused(getattr(os, name)))

    def noted(error: BaseException) -> bool:
        print(NO_ROOM, file=sys.stderr, flush=True)
        return out_of_memory(error)

    fill.out_of_memory = noted


@dataclass
class Member:
    """One process of the team, and its fate."""

    dspark: Dspark
    fate: str
    at: float
    """Time of its fate, of the steady clock."""
    phase: int
    continues: float | None = None
    """Time at which it continues, while it is paused."""
    done: str = ""
    """Signals that it got, as a word."""


@dataclass
class Team:
    """Keeps three processes at work until the cache is complete.

    Args:
        phases: options of the command, one list after another; a process that ends with the phase's message
            begins the next phase.
        messages: parts of that message, one per phase but the last.
    """

    folder: Path
    command: Sequence[str | Path]
    cache: Path
    phases: Sequence[Sequence[str]]
    messages: Sequence[str]
    watch: Watch
    seed: int = 0
    phase: int = 0
    seen: Counter[str] = field(default_factory=Counter)
    """Events by name."""

    def __post_init__(self) -> None:
        self._chance = random.Random(self.seed)
        self._members: dict[int, Member] = {}
        self._rests = dict.fromkeys(range(MEMBERS), 0.0)
        self._flag = self.folder / "disk is full"
        self._started = 0
        self._full = False
        self._progress = (time.monotonic(), 0)
        self.folder.mkdir()

    def complete(self) -> bool:
        """Return whether the cache is complete."""
        return (self.cache / "manifest.json").exists() and read_manifest(self.cache).status == "complete"

    def run(self) -> None:
        """Fill the cache. Twice, when a third and two thirds of the shards are finished, the disk is full."""
        try:
            self._fill()
        finally:
            for member in self._members.values():  # of a soak that has failed
                self._send(member, signal.SIGKILL)

    def _fill(self) -> None:
        """Keep the team at work until the cache is complete."""
        full = [(1 / 3, self._no_space), (2 / 3, self._small_files)]
        while not self.complete():
            self._step()
            if full and self._share() >= full[0][0]:
                self._full_disk(full.pop(0)[1])
        assert not full, "the disk was never full twice"
        for member in self._members.values():
            self._continue(member)
        self._await_all()

    def _share(self) -> float:
        """Return the share of shards that are finished."""
        done = len(finished_shards(self.cache))
        if done > self._progress[1]:
            self._progress = (time.monotonic(), done)
        silent = time.monotonic() - self._progress[0]
        assert silent < HANG_SECONDS, (
            f"no shard in {silent:.0f} s: {[m.dspark.err for m in self._members.values()]}"
        )
        manifest = self.cache / "manifest.json"
        return done / len(read_manifest(self.cache).plan) if manifest.exists() else 0.0

    def _step(self) -> None:
        """Start who is missing, let fates happen, and look."""
        now = time.monotonic()
        for slot in range(MEMBERS):
            if slot not in self._members and now >= self._rests[slot]:
                self._start(slot)
        for member in self._members.values():
            if member.continues is not None and now >= member.continues:
                self._continue(member)
            if now >= member.at:
                self._strike(member)
        self._look()

    def _start(self, slot: int) -> None:
        self._started += 1
        words = (*self.command, "--worker", f"{slot}/{MEMBERS}", *self.phases[self.phase])
        dspark = Dspark(
            self.folder / f"{self._started:04d}", *words, before=soaked, DISK_FULL=str(self._flag)
        )
        fate, age = self._chance.choice(FATES), self._chance.uniform(0.5, OLDEST_SECONDS)
        self._members[slot] = Member(dspark, fate, time.monotonic() + age, self.phase)
        self.seen["started"] += 1

    def _send(self, member: Member, number: signal.Signals) -> None:
        if member.dspark.process.exitcode is None:
            member.dspark.send(number)

    def _continue(self, member: Member) -> None:
        if member.continues is not None:
            member.continues = None
            self._send(member, signal.SIGCONT)

    def _strike(self, member: Member) -> None:
        """Let a process meet its fate."""
        fate, member.at = member.fate, float("inf")
        if fate.startswith("pause"):
            pause = self._chance.uniform(*PAUSE_SECONDS)
            self._send(member, signal.SIGSTOP)
            member.continues = time.monotonic() + pause
            if fate == "pause and kill":
                member.fate, member.at = "kill", time.monotonic() + pause / 2
        else:
            number = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM, "interrupt": signal.SIGINT}[fate]
            if number == signal.SIGKILL or member.dspark.err:  # the command itself has begun
                member.done = fate
                self._send(member, number)
        self.seen[fate] += 1

    def _collect(self) -> None:
        """Take note of who has ended, and check that it ended as it should."""
        for slot, member in list(self._members.items()):
            code = member.dspark.process.exitcode
            if code is not None:
                member.dspark.process.join()
                self._judge(member, code)
                self._rests[slot] = time.monotonic() + self._chance.uniform(0, 2)
                del self._members[slot]

    def _judge(self, member: Member, code: int) -> None:
        errors = member.dspark.errors
        said = f"exit code {code} after {member.done or 'nothing'}: {member.dspark.err[-2000:]}"
        self.seen[f"exit code {code}"] += 1
        if code == 0:
            assert not errors, said
            return
        if code == -signal.SIGKILL:
            assert member.done == "kill", said
            return
        if code in (128 + signal.SIGTERM, 128 + signal.SIGINT, -signal.SIGTERM):
            assert member.done in ("terminate", "interrupt"), said
            return
        assert code == 1, said
        assert len(errors) == 1, said
        if any(os.strerror(number) in errors[0] for number in (errno.ENOSPC, errno.EFBIG)):
            assert self._full, said
            assert "same command" in errors[0], said
            self.seen["ended by a full disk"] += 1
        else:
            assert member.phase < len(self.messages), said
            assert self.messages[member.phase] in errors[0], said
            self.phase = max(self.phase, member.phase + 1)

    # The full disk

    def _no_space(self, full: bool) -> None:
        """Let every write fail with ENOSPC, or not any more."""
        if full:
            self._flag.touch()
        else:
            self._flag.unlink()

    def _small_files(self, full: bool) -> None:
        """Let the system refuse files beyond some size to all processes; new ones have no such limit."""
        if full:
            for member in self._members.values():
                if member.dspark.process.exitcode is None:
                    pid = member.dspark.process.pid
                    hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)[1]
                    resource.prlimit(pid, resource.RLIMIT_FSIZE, (FULL_FILE_BYTES, hard))

    def _full_disk(self, fill: Callable[[bool], None]) -> None:
        """Fill the disk while all are at work, until some have ended by it, and make room again."""
        before = self.seen["ended by a full disk"]
        while self.seen["ended by a full disk"] == before:
            assert not self.complete(), "nobody noticed the full disk"
            self._gather()
            self._full = True
            fill(True)
            self._await_all()
            fill(False)
            self._full = False
        self.seen["disk full"] += 1

    def _gather(self) -> None:
        """Let all members capture, with no fate, until they have begun or ended."""
        for slot in set(range(MEMBERS)) - set(self._members):
            self._start(slot)
        for member in self._members.values():
            self._continue(member)
            member.at = float("inf")
        while self._members and not all("tok/s" in m.dspark.err for m in self._members.values()):
            self._look()

    def _await_all(self) -> None:
        """Wait until every member has ended by itself."""
        deadline = time.monotonic() + HANG_SECONDS
        while self._members:
            assert time.monotonic() < deadline, [m.dspark.err for m in self._members.values()]
            self._look()

    def _look(self) -> None:
        """Look at the members, and collect those that have ended."""
        self.watch.look([member.dspark.process.pid for member in self._members.values()])
        self._collect()
        time.sleep(EVERY_SECONDS)
