"""Shards on their way to disk, in threads beside the target's forward.

A few buffers, each as large as the largest shard, go round: one is being filled, the others are being hashed
and written. When the disk is slower than the target, the loop waits for a buffer, so memory stays bounded.
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch
from torch import Tensor

from capture.shards.clock import Clock

WRITING_THREADS = 3


class ShardDisk:
    """Runs the last step of shards in threads. Leaving the context waits for what was put; errors are raised.

    Args:
        shard_bytes: the size of the largest shard.
        pinned: whether buffers are page-locked, as copies from a GPU want them.
    """

    def __init__(self, shard_bytes: int, clock: Clock, *, pinned: bool = False):
        self._shard_bytes, self._clock, self._pinned = shard_bytes, clock, pinned
        self._threads = ThreadPoolExecutor(WRITING_THREADS, thread_name_prefix="shard")
        # Last in, first out: a second buffer is made only when the first is still being written.
        self._free: queue.LifoQueue[Tensor | None] = queue.LifoQueue()
        for _ in range(WRITING_THREADS + 1):
            self._free.put(None)  # a buffer that nobody has needed yet
        self._jobs: list[Future[None]] = []

    def __enter__(self) -> ShardDisk:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(wait=True)
        if error is None:
            self.check()

    def buffer(self) -> Tensor:
        """A free buffer, `[shard_bytes]` uint8; waits for one. Raises what a write raised."""
        with self._clock.step("waiting"):
            memory = self._free.get()
        self.check()
        if memory is None:
            memory = torch.empty(self._shard_bytes, dtype=torch.uint8, pin_memory=self._pinned)
        return memory

    def put(self, memory: Tensor, finish: Callable[[], None]) -> None:
        """Run `finish` in a thread, then let `memory` be used again."""

        def job() -> None:
            try:
                finish()
            finally:
                self._free.put(memory)

        self._jobs.append(self._threads.submit(job))

    def check(self) -> None:
        """Raise what a write raised, if one did."""
        for job in [job for job in self._jobs if job.done()]:
            self._jobs.remove(job)
            job.result()
