"""The progress of a capture to an object store, as `dspark inspect` shows it."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

from pipeline import config, process
from pipeline.cache.manifest import PROGRESS, Manifest, shard_file
from pipeline.cache.progress.claims import DEAD_AFTER_SECONDS, MAX_WORKER_BYTES, WorkerState
from pipeline.cache.progress.records import TARGET
from pipeline.errors import ConfigError
from pipeline.remote.objects import MissingObjectError, Objects


@dataclass(frozen=True)
class RemoteProgress:
    """The finished shards of an object store, and who works on the rest."""

    finished: dict[int, int]
    """Bytes of each finished shard."""
    target_written: bool
    workers: list[WorkerState]
    """Those that seem to be alive."""


def remote_progress(objects: Objects, manifest: Manifest) -> RemoteProgress:
    """Look at an unfinished cache. Its objects may come and go at any moment.

    Raises:
        StoreError: it can't be read.
    """
    found = {entry.name: entry for entry in objects.list(PROGRESS)}
    sizes = {entry.name: entry.bytes for entry in objects.list("shards")}
    finished = {
        shard: sizes[shard_file(shard)]
        for shard in range(len(manifest.plan))
        if f"{PROGRESS}/{shard:05d}.json" in found and shard_file(shard) in sizes
    }
    workers = []
    for name, entry in sorted(found.items()):
        state = worker_state(objects, name) if name.startswith(f"{PROGRESS}/worker-") else None
        if state is None:
            continue
        age = abs(time.time() - entry.modified.timestamp())
        here = state.place == process.place()
        if process.alive(state.pid, state.started) if here else age < DEAD_AFTER_SECONDS:
            workers.append(state)
    return RemoteProgress(finished, f"{PROGRESS}/{TARGET}" in found, workers)


def worker_state(objects: Objects, name: str) -> WorkerState | None:
    """Return what a worker's object says; None without a valid one."""
    try:
        return config.build(WorkerState, json.loads(objects.read(name)[:MAX_WORKER_BYTES]))
    except (MissingObjectError, ValueError, RecursionError, ConfigError):
        return None
