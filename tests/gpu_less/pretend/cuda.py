"""The names of `torch.cuda` that the pretend device answers for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tests.gpu_less.pretend.ledger import LEDGER
from tests.gpu_less.pretend.machine import MACHINE, Event, Properties, Stream


class Device:
    """`torch.cuda.device`: a context in which a GPU is the thread's current one."""

    def __init__(self, device: Any):
        self._wanted = -1 if device is None else device
        self._before = 0

    def __enter__(self) -> None:
        self._before = MACHINE.device
        MACHINE.device = MACHINE.number(self._wanted)

    def __exit__(self, *_: object) -> bool:
        MACHINE.device = self._before
        return False


class DeviceOf(Device):
    """`torch.cuda.device_of`: the same for a tensor's GPU."""

    def __init__(self, tensor: Tensor):
        super().__init__(tensor.get_device() if tensor.is_cuda else -1)


@contextmanager
def stream(chosen: Stream | None) -> Iterator[None]:
    """Make a stream current, and its GPU."""
    if chosen is None:
        yield
        return
    with chosen:
        yield


def current_stream(device: Any = None) -> Stream:
    return MACHINE.stream(MACHINE.number(device))


def default_stream(device: Any = None) -> Stream:
    return MACHINE.default(MACHINE.number(device))


def set_device(device: Any) -> None:
    number = MACHINE.number(device)
    LEDGER.context("set_device", number)
    MACHINE.device = number


def synchronize(device: Any = None) -> None:
    number = MACHINE.number(device)
    LEDGER.context("synchronize", number)
    LEDGER.sync("torch.cuda.synchronize", number)
    for each in [s for s in MACHINE.streams if s.device.index == number]:
        MACHINE.wait(each.clock)


def mem_get_info(device: Any = None) -> tuple[int, int]:
    number = MACHINE.number(device)
    LEDGER.context("mem_get_info", number)
    total = MACHINE.properties.total_memory
    return total - MACHINE.memory[number].now, total


def memory_stats(device: Any = None) -> dict[str, int]:
    memory = MACHINE.memory[MACHINE.number(device)]
    return {
        "allocated_bytes.all.current": memory.now,
        "allocated_bytes.all.peak": memory.peak,
        "reserved_bytes.all.current": memory.now,
        "reserved_bytes.all.peak": memory.peak,
        "num_alloc_retries": 0,
        "num_ooms": 0,
    }


def reset_peak_memory_stats(device: Any = None) -> None:
    memory = MACHINE.memory[MACHINE.number(device)]
    memory.peak = memory.now


def get_device_properties(device: Any = None) -> Properties:
    MACHINE.number(device)
    return MACHINE.properties


def _no_rng_state(device: Any = None) -> Tensor:
    return torch.zeros(16, dtype=torch.uint8)


def _take_rng_state(state: Tensor, device: Any = None) -> None:
    if state.is_cuda or state.dtype != torch.uint8:
        raise TypeError("RNG state must be a torch.ByteTensor")


def names() -> dict[str, Any]:
    """Return every name of `torch.cuda` that is replaced, with its value."""

    def number(key: str) -> Any:
        return lambda device=None: memory_stats(device)[f"{key}"]

    def nothing(*_: Any, **__: Any) -> None:
        return None

    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_is_compiled": lambda: True,
        "_lazy_init": nothing,
        "init": nothing,
        "device_count": lambda: MACHINE.gpus,
        "current_device": lambda: MACHINE.device,
        "set_device": set_device,
        "device": Device,
        "device_of": DeviceOf,
        "Stream": Stream,
        "Event": Event,
        "stream": stream,
        "StreamContext": stream,
        "current_stream": current_stream,
        "default_stream": default_stream,
        "set_stream": MACHINE.set_stream,
        "synchronize": synchronize,
        "get_device_name": lambda device=None: MACHINE.properties.name,
        "get_device_capability": lambda device=None: (MACHINE.properties.major, MACHINE.properties.minor),
        "get_device_properties": get_device_properties,
        "get_arch_list": lambda: ["sm_90"],
        "is_bf16_supported": lambda including_emulation=True: True,
        "mem_get_info": mem_get_info,
        "memory_stats": memory_stats,
        "memory_allocated": number("allocated_bytes.all.current"),
        "max_memory_allocated": number("allocated_bytes.all.peak"),
        "memory_reserved": number("reserved_bytes.all.current"),
        "max_memory_reserved": number("reserved_bytes.all.peak"),
        "reset_peak_memory_stats": reset_peak_memory_stats,
        "empty_cache": nothing,
        "ipc_collect": nothing,
        "manual_seed": nothing,
        "manual_seed_all": nothing,
        "get_rng_state": _no_rng_state,
        "set_rng_state": _take_rng_state,
    }
