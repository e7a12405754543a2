"""Time of a capture: seconds by step, on the device and in the writing threads."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Sum the seconds of named steps. Work on a GPU is timed by CUDA events, without waiting for it."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._events: deque[tuple[str, torch.cuda.Event, torch.cuda.Event]] = deque()
        self._lock = threading.Lock()

    @contextmanager
    def step(self, name: str, device: torch.device | None = None) -> Iterator[None]:
        """Time a block; with a CUDA `device`, time the work that it puts on that device's current stream."""
        if device is None or device.type != "cuda":
            began = time.perf_counter()
            try:
                yield
            finally:
                self._add(name, time.perf_counter() - began)
            return
        with torch.cuda.device(device):
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            yield
            after.record()
        self._events.append((name, before, after))
        self._collect(wait=False)

    def seconds(self) -> dict[str, float]:
        """Return the sums by name. Waits for the device."""
        self._collect(wait=True)
        return dict(self._seconds)

    def _collect(self, *, wait: bool) -> None:
        while self._events and (wait or self._events[0][2].query()):
            name, before, after = self._events.popleft()
            if wait:
                after.synchronize()
            self._add(name, before.elapsed_time(after) / 1000)

    def _add(self, name: str, seconds: float) -> None:
        with self._lock:
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds
