"""Claims on shards of a cache in an object store, as FORMAT.md, rule 23, has them in a directory.

A claim is an object that only one process can create, by a conditional write. A worker writes an object of
its own every few seconds; the store's own times say how long ago that was.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from types import TracebackType

from pipeline import process
from pipeline.cache.manifest import PROGRESS
from pipeline.cache.progress import claims
from pipeline.cache.progress.claims import is_id, own_state
from pipeline.cache.remote.progress import worker_state
from pipeline.remote.objects import MissingObjectError, Objects, StoreError


class RemoteWorker:
    """This process as a worker on a cache in an object store. See `Worker`, whose interface it has.

    Raises:
        StoreError: the store can't be written to, or has no conditional writes.
    """

    def __init__(self, objects: Objects, label: str = ""):
        self._objects, self._label = objects, label
        self._id = f"{process.place()}-{os.getpid()}-{time.time_ns():x}"
        self._name = _worker_name(self._id)
        self._began, self._tokens = time.monotonic(), 0
        self._claims: dict[str, tuple[str, list[tuple[str, str]]]] = {}
        """Own claims by name, each with the claims that it is inherited from and their dead owners."""
        self._stop = threading.Event()
        self._pulse = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> RemoteWorker:
        self._objects.require_conditional(f"{PROGRESS}/probe-{self._id}")
        self._touch()
        self._pulse.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._pulse.join()
        with contextlib.suppress(StoreError):  # the first error counts; dead claims are inherited
            for name in list(self._claims):
                self.release(name)
            self._objects.remove([self._name])

    def captured(self, tokens: int) -> None:
        """Count captured tokens, for `dspark inspect`."""
        self._tokens += tokens

    def claim(self, name: str) -> bool:
        """Try to become the owner of `name`; return False if a living process owns it. Raises StoreError."""
        claim, before = f"{PROGRESS}/{name}.claim", []
        while True:
            heir = _heir(name, claim, self._id)
            if self._objects.create(claim, self._id.encode()) and self._owner(heir) is None:
                if all(self._owner(each) == owner for each, owner in before):
                    self._claims[name] = (claim, before)
                    return True
                self._objects.remove([claim])  # the claim before it was released, not left by a dead owner
            else:
                owner = self._owner(claim)
                if owner is not None:
                    heir = _heir(name, claim, owner)
                    # Of an owner that was inherited from, this process or another, it says nothing any more.
                    if self._owner(heir) is None and self._lives(owner):
                        return False
                    before.append((claim, owner))
                    claim = heir
                    continue
            claim, before = f"{PROGRESS}/{name}.claim", []

    def owns(self, name: str) -> bool:
        """Return whether this process owns `name` still: others inherit from one that was long silent.

        Raises:
            StoreError: the store can't be read.
        """
        claim, before = self._claims.get(name, ("", []))
        if not claim or self._owner(_heir(name, claim, self._id)) is not None:
            return False
        return all(self._owner(each) == owner for each, owner in [*before, (claim, self._id)])

    def release(self, name: str) -> None:
        """Release the claim on `name`, whether it was written or not. Raises StoreError.

        One that another process has inherited stays: without it the heir's would not hold.
        """
        claim, _ = self._claims.pop(name, ("", []))
        if claim and self._owner(claim) == self._id and self._owner(_heir(name, claim, self._id)) is None:
            self._objects.remove([claim])

    def others_died(self, waiting: Callable[[int], object]) -> bool:
        """Wait until it is clear which other workers live. See `Worker.others_died`."""
        unsure = {name: at for name, at in self._workers().items() if self._is_elsewhere(name)}
        died = False
        while unsure:
            now = self._workers()
            for name, before in list(unsure.items()):
                if name not in now or not self._lives(_id_of(name)):
                    died = True
                elif now[name] == before:
                    continue
                del unsure[name]
            if unsure:
                waiting(len(unsure))
                time.sleep(min(1.0, claims.HEARTBEAT_SECONDS))
        return died

    def _workers(self) -> dict[str, datetime]:
        """Return when each worker last wrote its object, by name."""
        listed = self._objects.list(PROGRESS)
        return {e.name: e.modified for e in listed if e.name.startswith(f"{PROGRESS}/worker-")}

    def _owner(self, claim: str) -> str | None:
        """Return the id in a claim; None if there is no such claim."""
        try:
            return self._objects.read(claim).decode(errors="replace")
        except MissingObjectError:
            return None

    def _is_elsewhere(self, name: str) -> bool:
        """Return whether a worker is on another machine, so that only its object shows whether it lives."""
        state = None if name == self._name else worker_state(self._objects, name)
        return state is not None and state.place != process.place()

    def _lives(self, owner: str) -> bool:
        """Return whether the worker of that id is alive."""
        state = worker_state(self._objects, _worker_name(owner)) if is_id(owner) else None
        if state is None:
            return False
        if state.place == process.place():
            return process.alive(state.pid, state.started)
        self._touch()  # the store's clock, not this machine's, says how old the other's object is
        times = self._workers()
        theirs, ours = times.get(_worker_name(owner)), times.get(self._name)
        if theirs is None or ours is None:
            return False
        return abs((ours - theirs).total_seconds()) < claims.DEAD_AFTER_SECONDS

    def _touch(self) -> None:
        state = own_state(self._label, self._began, self._tokens)
        self._objects.write(self._name, json.dumps(asdict(state)).encode())

    def _beat(self) -> None:
        while not self._stop.wait(claims.HEARTBEAT_SECONDS):
            with contextlib.suppress(StoreError):  # a missed heartbeat is no reason to stop
                self._touch()


def _heir(name: str, claim: str, owner: str) -> str:
    """Return the claim on `name` of whoever inherits it from a claim's owner."""
    own = claim.rpartition("/")[2]
    digest = hashlib.sha256(f"{own} {owner}".encode()).hexdigest()[:24]
    return f"{PROGRESS}/{name}~{digest}.claim"


def _worker_name(worker: str) -> str:
    return f"{PROGRESS}/worker-{worker}.json"


def _id_of(name: str) -> str:
    return name.removeprefix(f"{PROGRESS}/worker-").removesuffix(".json")
