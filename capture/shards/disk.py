"""Write shards in threads while the target computes the next one.

A few buffers, each as large as the largest shard, are reused: one is filled while the others are hashed and
written. If the disk is slower than the target, the loop waits for a buffer, so memory stays bounded.
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch
from torch import Tensor

from capture.shards.clock import Clock
from pipeline.device import use_device

WRITING_THREADS = 3


class ShardDisk:
    """Run the last step of shards in threads. Leaving the context waits for them and raises their errors.

    Args:
        shard_bytes: size of the largest shard.
        device: device that the shards come from. For a GPU the buffers are page-locked, so that copies are
            asynchronous.
    """

    def __init__(self, shard_bytes: int, clock: Clock, device: torch.device):
        self._shard_bytes, self._clock, self._pinned = shard_bytes, clock, device.type == "cuda"
        # The last step of a shard waits for events of the device.
        self._threads = ThreadPoolExecutor(
            WRITING_THREADS, thread_name_prefix="shard", initializer=use_device, initargs=(device,)
        )
        # Last in, first out: a second buffer is allocated only if the first is still being written.
        self._free: queue.LifoQueue[Tensor | None] = queue.LifoQueue()
        for _ in range(WRITING_THREADS + 1):
            self._free.put(None)  # a buffer that is not allocated yet
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
        """Wait for a free buffer, `[shard_bytes]` uint8. Raises the error of a failed write."""
        with self._clock.step("waiting"):
            memory = self._free.get()
        self.check()
        if memory is None:
            memory = torch.empty(self._shard_bytes, dtype=torch.uint8, pin_memory=self._pinned)
        return memory

    def put(self, memory: Tensor, finish: Callable[[], None]) -> None:
        """Run `finish` in a thread, then return `memory` to the free buffers."""

        def job() -> None:
            try:
                finish()
            finally:
                self._free.put(memory)

        self._jobs.append(self._threads.submit(job))

    def check(self) -> None:
        """Raise the error of a failed write, if there is one."""
        for job in [job for job in self._jobs if job.done()]:
            self._jobs.remove(job)
            job.result()
