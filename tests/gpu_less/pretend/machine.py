"""GPUs, streams and events. Time is counted in launches: each stream has a clock that says what it is behind.

A stream's clock holds, for every stream, the last launch of it that is done before the stream's next launch.
Waiting merges clocks (vector clocks: Lamport 1978, Mattern 1989). The host has a clock too.

Which calls open a context follows PyTorch's sources: recording an event uses the stream's GPU; waiting for
one or asking for one, and page-locked memory, use the calling thread's current GPU, which is 0 in a new
thread (the comment at `CUDAEvent::elapsed_time` in c10/cuda says what that costs).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.gpu_less.pretend.ledger import LEDGER

# Copies of a stream that are not carried out yet, at most: a GPU is not further behind than that.
BACKLOG = 256

Clock = dict[int, int]
"""By the number of a stream: how many of its launches are done."""


@dataclass(frozen=True)
class Properties:
    """`torch.cuda.get_device_properties` of a pretend GPU."""

    name: str = "NVIDIA H100 80GB HBM3"
    total_memory: int = 80 * 2**30
    major: int = 9
    minor: int = 0
    multi_processor_count: int = 132
    warp_size: int = 32
    max_threads_per_multi_processor: int = 2048
    shared_memory_per_block: int = 48 * 2**10
    shared_memory_per_block_optin: int = 227 * 2**10
    shared_memory_per_multiprocessor: int = 228 * 2**10
    regs_per_multiprocessor: int = 65536
    L2_cache_size: int = 50 * 2**20
    is_integrated: int = 0
    is_multi_gpu_board: int = 0
    uuid: str = "pretend"
    gcnArchName: str = ""  # noqa: N815  CUDA has none


H100 = Properties()


@dataclass
class Memory:
    """Bytes of tensors on a GPU."""

    now: int = 0
    peak: int = 0

    def change(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


@dataclass
class Machine:
    """GPUs of this process, and each thread's current one."""

    properties: Properties = H100
    memory: list[Memory] = field(default_factory=lambda: [Memory()])
    lock: Any = field(default_factory=threading.RLock)
    host: Clock = field(default_factory=dict)
    """Work that the host knows to be done."""
    streams: list[Stream] = field(default_factory=list)
    """Every stream, by its number."""
    defaults: dict[int, Stream] = field(default_factory=dict)
    """The default stream of each GPU."""
    _thread: threading.local = field(default_factory=threading.local)

    @property
    def gpus(self) -> int:
        return len(self.memory)

    @property
    def device(self) -> int:
        """The calling thread's current GPU."""
        return getattr(self._thread, "device", 0)

    @device.setter
    def device(self, number: int) -> None:
        self._thread.device = number

    def number(self, device: Any = None) -> int:
        """Return the number of a GPU by any of torch's ways to name it; None is the current one."""
        if isinstance(device, str | torch.device):
            device = torch.device(device)
            if device.type != "cuda":
                raise ValueError(f"Expected a cuda device, but got: {device}")
            device = device.index
        if device is None or device < 0:
            return self.device
        if device >= self.gpus:
            raise torch.AcceleratorError("CUDA error: invalid device ordinal")
        return device

    def stream(self, device: int) -> Stream:
        """Return the calling thread's current stream on a GPU."""
        return getattr(self._thread, "streams", {}).get(device) or self.default(device)

    def set_stream(self, stream: Stream) -> None:
        """Make a stream current in the calling thread, and its GPU."""
        own = self._thread.__dict__.setdefault("streams", {})
        own[stream.device.index] = stream
        self.device = stream.device.index

    def default(self, device: int) -> Stream:
        with self.lock:
            if device not in self.defaults:
                self.defaults[device] = Stream(device)
            return self.defaults[device]

    def wait(self, clock: Clock) -> None:
        """Let the host wait until everything in a clock is done."""
        with self.lock:
            merge(self.host, clock)
            for number, upto in clock.items():
                self.streams[number].drain(upto)

    def done(self, clock: Clock) -> bool:
        """Return whether the host knows that everything in a clock is done."""
        with self.lock:
            return all(self.host.get(number, 0) >= upto for number, upto in clock.items())


def merge(clock: Clock, other: Clock) -> None:
    """Let a clock be behind everything that another one is behind."""
    for number, upto in other.items():
        clock[number] = max(clock.get(number, 0), upto)


MACHINE = Machine()


class Stream:
    """`torch.cuda.Stream`: launches in order, and the copies that are not carried out yet."""

    def __init__(self, device: Any = None, priority: int = 0, **_: Any):
        number = MACHINE.number(device)
        self.device = torch.device("cuda", number)
        self.priority = priority
        self.launches = 0
        self.clock: Clock = {}
        self._late: deque[tuple[int, Callable[[], None]]] = deque()
        with MACHINE.lock:
            self.number = self.cuda_stream = self.stream_id = len(MACHINE.streams)
            MACHINE.streams.append(self)

    def launch(self) -> int:
        """Begin a launch, which is behind everything the host knows of; return its number."""
        merge(self.clock, MACHINE.host)
        self.launches += 1
        self.clock[self.number] = self.launches
        return self.launches

    def late(self, work: Callable[[], None]) -> None:
        """Carry something out when the host waits for the launch that has just begun."""
        self._late.append((self.launches, work))
        while len(self._late) > BACKLOG:
            self._late.popleft()[1]()

    def drain(self, upto: int) -> None:
        """Carry out what is late, up to a launch."""
        while self._late and self._late[0][0] <= upto:
            self._late.popleft()[1]()

    def wait_stream(self, other: Stream) -> None:
        with MACHINE.lock:
            merge(self.clock, other.clock)

    def wait_event(self, event: Event) -> None:
        event.wait(self)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        LEDGER.context("wait for a stream", self.device.index)
        LEDGER.sync("Stream.synchronize", self.device.index)
        MACHINE.wait(self.clock)

    def query(self) -> bool:
        LEDGER.context("ask for a stream", self.device.index)
        return MACHINE.done(self.clock)

    def __enter__(self) -> Stream:
        self._before = MACHINE.device, MACHINE.stream(self.device.index)
        MACHINE.set_stream(self)
        return self

    def __exit__(self, *_: object) -> None:
        device, stream = self._before
        MACHINE.set_stream(stream)
        MACHINE.device = device


class Event:
    """`torch.cuda.Event`."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False):
        self._timing = enable_timing
        self.device: torch.device | None = None
        self._clock: Clock = {}
        self._asked = False
        self._time = 0.0

    def record(self, stream: Stream | None = None) -> None:
        stream = stream or MACHINE.stream(MACHINE.device)
        LEDGER.context("record an event", stream.device.index)
        with MACHINE.lock:
            stream.launch()
            self._clock = dict(stream.clock)
        self.device, self._asked, self._time = stream.device, False, time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        stream = stream or MACHINE.stream(MACHINE.device)
        with MACHINE.lock:
            merge(stream.clock, self._clock)

    def synchronize(self) -> None:
        if self.device is not None:
            LEDGER.context("wait for an event", MACHINE.device)
            LEDGER.sync("Event.synchronize", self.device.index)
            MACHINE.wait(self._clock)

    def query(self) -> bool:
        """Return whether the event has come. It comes between two questions, never before the first."""
        if self.device is None:
            return True
        LEDGER.context("ask for an event", MACHINE.device)
        if self._asked:
            MACHINE.wait(self._clock)
        self._asked = True
        return MACHINE.done(self._clock)

    def elapsed_time(self, end: Event) -> float:
        if not (self._timing and end._timing):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        if not (MACHINE.done(self._clock) and MACHINE.done(end._clock)):
            raise RuntimeError("CUDA error: device not ready")
        return max(1e-6, end._time - self._time) * 1000
