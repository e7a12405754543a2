"""Devices by name, and their abilities."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TypeVar

import torch

from pipeline.errors import UsageError

T = TypeVar("T")


def resolve_device(name: str) -> torch.device:
    """Return the device of that name, a GPU with its number. `auto` is CUDA if available, else the CPU.

    Raises:
        UsageError: torch can't compute on this device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()  # fails on a device that does not compute, such as meta
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            f"device {name!r} can't be used here ({str(error).splitlines()[0]}): choose another, such as auto"
        ) from None
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def use_device(device: torch.device) -> None:
    """Make a GPU the calling thread's current one; do nothing for another device.

    A new thread begins with GPU 0. Page-locked memory, and waiting for an event, open a context on the
    current GPU, which takes half a gigabyte there: call this first in every thread that does either.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)


def native_bf16(device: torch.device) -> bool:
    """Return whether `device` multiplies bf16 matrices in hardware. Emulation is far slower than fp32."""
    if device.type != "cpu":
        return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))


def reuse_freed_memory() -> None:
    """Let glibc keep freed memory for the next allocation instead of returning it to the kernel.

    Otherwise every large CPU tensor is mapped anew and faulted in page by page, which took over a quarter of
    a training step of the example. The process keeps its peak memory until it ends. Does nothing if the C
    library has no mallopt.
    """
    m_trim_threshold, m_mmap_max = -1, -4  # from glibc's malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


# Words of allocators in a plain RuntimeError: CUDA and HIP, cuBLAS and cuDNN, MPS, the CPU.
_NO_MEMORY = (
    "out of memory",
    "ALLOC_FAILED",
    "Invalid buffer size",
    "can't allocate memory",
    "not enough memory",
)


def out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that a device or the host has too little memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def if_it_fits(run: Callable[[], T]) -> T | None:
    """Return the result of `run`; None, keeping no memory of it, if it does not fit."""
    try:
        return run()
    except (RuntimeError, MemoryError) as error:  # its traceback keeps the memory, and ends here
        if not out_of_memory(error):
            raise
    return None
