"""Who writes which shard: any number of processes fill one cache, on one machine or many, without a server.

A process at work keeps a small file that it touches every few seconds (its heartbeat), and holds a shard by
a claim: a file that only one process can create, with the owner's name in it. Where the owner is dead, what
it left is claimed in the same way, by a file named after that claim and its owner: so only one process
can. Should two processes ever hold one shard all the same, each writes a whole file, on equal hardware with
the same bytes, so that costs time and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from pipeline import config, files, process
from pipeline.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.cache.writer import CacheWriter

HEARTBEAT_SECONDS = 10.0
# A process of another machine counts as dead when its file was not touched for so long. Network file
# systems may show a change after up to a minute.
DEAD_AFTER_SECONDS = 150.0
MAX_WORKER_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class WorkerState:
    """What a process at work says of itself."""

    label: str
    """For people: which of how many it is."""
    host: str
    place: str
    """Where its process id means something, see `pipeline.process`."""
    pid: int
    started: str | None
    """When that process began, in the kernel's count: ids come back."""
    seconds: float = 0.0
    """Since it began to capture."""
    tokens: int = 0
    """Captured by it."""


class Worker:
    """This process at work on one cache. Use as a context manager: leaving it gives everything back.

    Args:
        folder: the cache's `progress/`.
        label: for people, such as `1/4`.

    Raises:
        FileNotFoundError: the folder is gone, because the cache was completed.
        WriteError: its file can't be written.
    """

    def __init__(self, folder: Path, label: str = ""):
        self.folder = folder
        self._id = f"{process.place()}-{os.getpid()}-{time.time_ns():x}"
        self._file = folder / f"worker-{self._id}.json"
        self._label, self._began, self._tokens = label, time.monotonic(), 0
        self._claims: dict[str, Path] = {}
        self._stop = threading.Event()
        self._pulse = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Worker:
        try:
            self._touch()  # first, because its time is what others' are compared with
        except FileNotFoundError:  # the cache was completed
            raise
        except OSError as error:
            raise files.write_error(self._file, error) from error
        for path in self.folder.glob("worker-*.json"):  # those that were killed
            if path != self._file and not self._at_work(_id_of(path)):
                with contextlib.suppress(OSError):
                    path.unlink()
        self._pulse.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._pulse.join()
        for name in list(self._claims):
            self.release(name)
        with contextlib.suppress(OSError):
            self._file.unlink(missing_ok=True)

    def captured(self, tokens: int) -> None:
        """Count tokens, for whoever looks from outside."""
        self._tokens += tokens

    def claim(self, name: str) -> bool:
        """Try to become the owner of `name`. False when a living process holds it.

        Raises:
            FileNotFoundError: the folder is gone, because the cache was completed.
            WriteError: the claim can't be written.
        """
        path, before = self.folder / f"{name}.claim", []
        while True:
            try:
                self._create(path)
            except FileExistsError:
                try:
                    owner = self._owner(path)
                    if self._lives(path, owner):
                        return False
                    before.append((path, owner))
                    heir = hashlib.sha256(f"{path.name} {owner}".encode()).hexdigest()[:24]
                    path = self.folder / f"{name}~{heir}.claim"
                    continue
                except FileNotFoundError:  # given back this moment
                    pass
            else:
                with contextlib.suppress(FileNotFoundError):
                    if all(self._owner(claim) == owner for claim, owner in before):
                        self._claims[name] = path
                        return True
                path.unlink(missing_ok=True)  # an heir, but what it follows was given back, not left
            path, before = self.folder / f"{name}.claim", []

    def others_died(self, waiting: Callable[[int], object]) -> bool:
        """Find out about processes elsewhere, whose life shows in nothing but heartbeats.

        Returns at once where there are none, after a heartbeat where all of them live, and else when the time
        after which they count as dead has passed.

        Args:
            waiting: called about every second with the number of those that have shown no sign of life since
                the waiting began; may raise to stop it.

        Returns:
            Whether one of them turned out to be dead, so that what it held can be claimed.
        """
        unsure, died = {}, False
        for path in self.folder.glob("worker-*.json"):
            state = read_worker(path)
            if path != self._file and state and state.place != process.place():
                with contextlib.suppress(OSError):
                    unsure[path] = path.stat().st_mtime_ns
        while unsure:
            for path, before in list(unsure.items()):
                try:
                    if path.stat().st_mtime_ns != before:
                        del unsure[path]
                    elif not self._at_work(_id_of(path)):
                        del unsure[path]
                        died = True
                except OSError:  # it ended, and gave back what it held
                    del unsure[path]
                    died = True
            if unsure:
                waiting(len(unsure))
                time.sleep(min(1.0, HEARTBEAT_SECONDS))
        return died

    def _create(self, path: Path) -> None:
        """Make a claim, its owner's name in it from the first moment on where the file system has links."""
        named = path.with_name(files.partial_name(f"{path.name}-{self._id}"))
        try:
            try:
                named.write_text(self._id)
                os.link(named, path)
            except (FileExistsError, FileNotFoundError):
                raise
            except OSError:
                self._create_unnamed(path)
            finally:
                named.unlink(missing_ok=True)
        except (FileExistsError, FileNotFoundError):
            raise
        except OSError as error:
            raise files.write_error(path, error) from error

    def _create_unnamed(self, path: Path) -> None:
        with path.open("xb", buffering=0) as file:
            try:
                file.write(self._id.encode())
            except OSError:  # a claim without a name in it would be in everybody's way
                path.unlink(missing_ok=True)
                raise

    def release(self, name: str) -> None:
        """Give `name` up, written or not."""
        path = self._claims.pop(name, None)
        with contextlib.suppress(OSError):
            if path and self._owner(path) == self._id:
                path.unlink(missing_ok=True)

    def _owner(self, path: Path) -> str:
        """What a claim says: the id of its owner, nothing yet, or, where no claim lies there, nonsense.

        Raises:
            FileNotFoundError: there is nothing.
        """
        try:
            return files.read_small(path, MAX_WORKER_BYTES).decode(errors="replace")
        except FileNotFoundError:
            raise
        except OSError:
            return "no claim"

    def _lives(self, claim: Path, owner: str) -> bool:
        """Whether a claim's owner is at work."""
        if not owner:  # it is being written this moment, or its owner died between two system calls
            return self._age(claim) < DEAD_AFTER_SECONDS
        return self._at_work(owner)

    def _at_work(self, owner: str) -> bool:
        """Whether the process with that id is at work."""
        if not _is_id(owner):
            return False
        path = self.folder / f"worker-{owner}.json"
        state = read_worker(path)
        if state is None:
            return False
        if state.place == process.place():
            return process.alive(state.pid, state.started)
        try:
            return self._age(path) < DEAD_AFTER_SECONDS
        except FileNotFoundError:
            return False

    def _age(self, path: Path) -> float:
        """Seconds since a file was last written, by the clock of the file system and no other.

        A time to come is as far from now as one that is gone: clocks are set back, and files lie.
        """
        try:
            os.utime(self._file)
            now = self._file.stat().st_mtime
        except OSError:  # not there yet
            now = time.time()
        with path.open("rb") as file:  # opening asks a network file system for the truth
            return abs(now - os.fstat(file.fileno()).st_mtime)

    def _touch(self) -> None:
        state = WorkerState(
            label=self._label,
            host=socket.gethostname(),
            place=process.place(),
            pid=os.getpid(),
            started=process.started(os.getpid()),
            seconds=time.monotonic() - self._began,
            tokens=self._tokens,
        )
        partial = self._file.with_name(files.partial_name(self._file.name))
        partial.write_text(json.dumps(asdict(state)))
        partial.replace(self._file)

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):  # a heartbeat alone is no reason to stop
                self._touch()


def _id_of(path: Path) -> str:
    """The id of the process whose file this is."""
    return path.name.removeprefix("worker-").removesuffix(".json")


# As `Worker` makes them; whatever else a claim may say names no file.
_is_id = re.compile(r"[0-9a-f]{1,64}-[0-9]{1,20}-[0-9a-f]{1,20}").fullmatch


def read_worker(path: Path) -> WorkerState | None:
    """What a worker's file says; None when there is none, or none that makes sense."""
    try:
        return config.build(WorkerState, json.loads(files.read_small(path, MAX_WORKER_BYTES)))
    except (OSError, ValueError, RecursionError, ConfigError):
        return None


def claim_name(shard: int) -> str:
    """What a shard is called among claims."""
    return f"{shard:05d}"


def take_shards(writer: CacheWriter, worker: Worker, rank: int = 0, world: int = 1) -> Iterator[int]:
    """Shards that are not written yet, each claimed for this process, until none is left to claim.

    Process `rank` of `world` takes every `world`-th shard, then helps with the rest from the far end.
    """
    number = len(writer.manifest.plan)
    own = range(rank, number, world)
    for shard in [*own, *(s for s in reversed(range(number)) if s % world != rank)]:
        if writer.written(shard):
            continue
        try:
            claimed = worker.claim(claim_name(shard))
        except FileNotFoundError:  # the cache was completed by another process
            return
        if not claimed:
            continue
        if writer.written(shard):  # by another, between the two questions
            worker.release(claim_name(shard))
        elif not writer.progress.is_dir():
            return
        else:
            yield shard


def live_workers(folder: Path) -> list[WorkerState]:
    """Every process at work on a cache, as far as can be told without writing anything."""
    states = []
    for path in sorted(folder.glob("worker-*.json")):
        state = read_worker(path)
        with contextlib.suppress(OSError):
            here = state is not None and state.place == process.place()
            age = abs(time.time() - path.lstat().st_mtime)
            if state and (process.alive(state.pid, state.started) if here else age < DEAD_AFTER_SECONDS):
                states.append(state)
    return states
