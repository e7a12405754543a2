"""Claims on shards: any number of processes fill one cache, on one machine or several, without a server.

A worker touches a small file of its own every few seconds (its heartbeat). It owns a shard by a claim: a file
that only one process can create, with the owner's id in it. If the owner is dead, its claim is inherited by
another file, named after that claim and its owner, which again only one process can create. Should two
processes own one shard anyway, each writes a whole file, with the same bytes on equal hardware: that costs
time and nothing else.
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
# A process of another machine counts as dead if its file was not touched for this long. Network file systems
# may show a change a minute late.
DEAD_AFTER_SECONDS = 150.0
MAX_WORKER_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class WorkerState:
    """A worker's own account of itself."""

    label: str
    """Its number of how many, for messages."""
    host: str
    place: str
    """The space in which its process id is unique, see `pipeline.process`."""
    pid: int
    started: str | None
    """Start time of the process in the kernel's count, because process ids are reused."""
    seconds: float = 0.0
    """Seconds since it started to capture."""
    tokens: int = 0
    """Tokens captured by it."""


def own_state(label: str, began: float, tokens: int) -> WorkerState:
    """Return this process's account of itself.

    Args:
        began: when it started to capture, by `time.monotonic`.
    """
    return WorkerState(
        label=label,
        host=socket.gethostname(),
        place=process.place(),
        pid=os.getpid(),
        started=process.started(os.getpid()),
        seconds=time.monotonic() - began,
        tokens=tokens,
    )


class Worker:
    """This process as a worker on one cache. Use as a context manager: leaving it releases every claim.

    Args:
        folder: the cache's `progress/`.
        label: for messages, such as `1/4`.

    Raises:
        FileNotFoundError: the folder is gone, because the cache was completed.
        WriteError: the worker's file can't be written.
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
            self._touch()  # first, because ages are measured against its time
        except FileNotFoundError:  # the cache was completed
            raise
        except OSError as error:
            raise files.write_error(self._file, error) from error
        for path in self.folder.glob("worker-*.json"):  # of killed processes
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
        """Count captured tokens, for `dspark inspect`."""
        self._tokens += tokens

    def claim(self, name: str) -> bool:
        """Try to become the owner of `name`; return False if a living process owns it.

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
                except FileNotFoundError:  # just released
                    pass
            else:
                with contextlib.suppress(FileNotFoundError):
                    if all(self._owner(claim) == owner for claim, owner in before):
                        self._claims[name] = path
                        return True
                path.unlink(missing_ok=True)  # the claim before it was released, not left by a dead owner
            path, before = self.folder / f"{name}.claim", []

    def others_died(self, waiting: Callable[[int], object]) -> bool:
        """Wait until it is clear which workers of other machines live, which only their heartbeats show.

        Returns at once if there are none, after a heartbeat if all of them live, and at the latest when
        silent ones count as dead.

        Args:
            waiting: called about every second with the number of workers without a heartbeat since the start
                of the wait; may raise to stop it.

        Returns:
            True if one of them is dead or has ended, so that its claims can be taken.
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
                except OSError:  # it ended, and released its claims
                    del unsure[path]
                    died = True
            if unsure:
                waiting(len(unsure))
                time.sleep(min(1.0, HEARTBEAT_SECONDS))
        return died

    def _create(self, path: Path) -> None:
        """Create a claim with its owner's id in it: atomically if the file system has links."""
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
            except OSError:  # a claim without an id would block the others
                path.unlink(missing_ok=True)
                raise

    def release(self, name: str) -> None:
        """Release the claim on `name`, whether it was written or not."""
        path = self._claims.pop(name, None)
        with contextlib.suppress(OSError):
            if path and self._owner(path) == self._id:
                path.unlink(missing_ok=True)

    def _owner(self, path: Path) -> str:
        """Read a claim's owner: empty while it is being written, no valid id if it is not a plain file.

        Raises:
            FileNotFoundError: there is no claim.
        """
        try:
            return files.read_small(path, MAX_WORKER_BYTES).decode(errors="replace")
        except FileNotFoundError:
            raise
        except OSError:
            return "no claim"

    def _lives(self, claim: Path, owner: str) -> bool:
        """Return whether a claim's owner is alive."""
        if not owner:  # it is being written, or its owner died between two system calls
            return self._age(claim) < DEAD_AFTER_SECONDS
        return self._at_work(owner)

    def _at_work(self, owner: str) -> bool:
        """Return whether the worker of that id is alive."""
        if not is_id(owner):
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
        """Return the seconds since a file was last written, by the file system's own clock.

        A time in the future counts by its distance from now, because clocks are set back and files can lie.
        """
        try:
            os.utime(self._file)
            now = self._file.stat().st_mtime
        except OSError:  # not written yet
            now = time.time()
        with path.open("rb") as file:  # opening makes a network file system fetch the current time
            return abs(now - os.fstat(file.fileno()).st_mtime)

    def _touch(self) -> None:
        state = own_state(self._label, self._began, self._tokens)
        partial = self._file.with_name(files.partial_name(self._file.name))
        partial.write_text(json.dumps(asdict(state)))
        partial.replace(self._file)

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):  # a missed heartbeat is no reason to stop
                self._touch()


def _id_of(path: Path) -> str:
    """Return the id of the worker whose file this is."""
    return path.name.removeprefix("worker-").removesuffix(".json")


# An id as `Worker` makes it. Any other content of a claim must not become part of a path.
is_id = re.compile(r"[0-9a-f]{1,64}-[0-9]{1,20}-[0-9a-f]{1,20}").fullmatch


def read_worker(path: Path) -> WorkerState | None:
    """Read a worker's file; None without a valid one."""
    try:
        return config.build(WorkerState, json.loads(files.read_small(path, MAX_WORKER_BYTES)))
    except (OSError, ValueError, RecursionError, ConfigError):
        return None


def claim_name(shard: int) -> str:
    """Return the name of a shard's claim."""
    return f"{shard:05d}"


def take_shards(writer: CacheWriter, worker: Worker, rank: int = 0, world: int = 1) -> Iterator[int]:
    """Claim shards that are not written yet, one after the other, until none is left, and yield each.

    Process `rank` of `world` takes every `world`-th shard, then the other processes' from the end.
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
        if writer.written(shard):  # by another process, just before the claim
            worker.release(claim_name(shard))
        elif not writer.progress.is_dir():
            return
        else:
            yield shard


def live_workers(folder: Path) -> list[WorkerState]:
    """Return the living workers on a cache, as far as can be told without writing anything."""
    states = []
    for path in sorted(folder.glob("worker-*.json")):
        state = read_worker(path)
        with contextlib.suppress(OSError):
            here = state is not None and state.place == process.place()
            age = abs(time.time() - path.lstat().st_mtime)
            if state and (process.alive(state.pid, state.started) if here else age < DEAD_AFTER_SECONDS):
                states.append(state)
    return states
