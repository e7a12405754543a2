"""Called in a process with pretend GPUs: small programs, most of them wrong."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor


def _some() -> Tensor:
    return torch.tensor([1.0, 2.0], device="cuda")


def _seen(values: Tensor) -> list[Any]:
    return ["nan" if value != value else value for value in values.tolist()]


def read_too_early() -> dict[str, Any]:
    source, out = _some(), torch.empty(2, pin_memory=True)
    out.copy_(source, non_blocking=True)
    event = torch.cuda.current_stream().record_event()
    seen = {"early": _seen(out)}
    event.query()
    seen["event asked once"] = _seen(out)
    event.synchronize()
    return seen | {"waited": _seen(out)}


def copy_unpinned() -> None:
    source = _some()
    torch.empty(2).copy_(source, non_blocking=True)


def mix_cpu() -> None:
    _some() + torch.ones(2)


def mix_gpus() -> None:
    _some() + torch.ones((), device="cuda:1")


def index_cpu_by_gpu() -> None:
    torch.ones(3)[torch.zeros(1, dtype=torch.long, device="cuda")]


def gather_by_cpu() -> None:
    _some().gather(0, torch.zeros((), dtype=torch.long))


def to_numpy() -> None:
    _some().numpy()


def read_on_another_stream() -> None:
    values = _some() + 1
    with torch.cuda.stream(torch.cuda.Stream()):
        values * 2


def overwrite_what_another_stream_reads() -> None:
    values, stream = _some() + 1, torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        values * 2
    values.zero_()


def free_under_another_stream() -> None:
    values, stream = _some() + 1, torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        values * 2
    del values


def change_pinned_memory_too_early() -> None:
    pinned = torch.ones(2).pin_memory()
    pinned.to("cuda", non_blocking=True)
    pinned.zero_()
    torch.cuda.synchronize()


def wait_for_the_stream() -> None:
    values, stream = _some() + 1, torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        doubled = values * 2
    torch.cuda.current_stream().wait_stream(stream)
    values.add_(doubled)
    doubled.record_stream(torch.cuda.current_stream())


def wait_for_the_event() -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        values = torch.ones(2, device="cuda") * 2
        event = stream.record_event()
    torch.cuda.current_stream().wait_event(event)
    values.record_stream(torch.cuda.current_stream())
    values.add_(1)


def recorded_stream() -> None:
    values, stream = _some() + 1, torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        values * 2
    values.record_stream(stream)


def waits_of_many_kinds() -> None:
    values = _some()
    bool(values[0] > 0)
    values.tolist()
    values.nonzero()
    values[values > 1]
    values.unique()
    values.cpu()
    torch.cuda.synchronize()


def waits_of_no_kind() -> None:
    values = torch.zeros(4, device="cuda")
    values[values > 1] = 0.0  # a number of the host: torch fills by the mask
    values.masked_fill(values > 1, 3.0).index_select(0, torch.zeros(2, dtype=torch.long, device="cuda"))
    torch.where(values > 0, values, 1.0).cumsum(0).argsort(stable=True)
    pinned = torch.empty(4, pin_memory=True)
    pinned.copy_(values, non_blocking=True)
    torch.ones(4).pin_memory().to("cuda", non_blocking=True)
    torch.cuda.Event().record()


def pin_in_a_thread() -> None:
    torch.cuda.set_device(1)
    torch.empty(1, pin_memory=True)
    thread = threading.Thread(target=lambda: torch.empty(1, pin_memory=True), name="new")
    thread.start()
    thread.join()


def same_numbers() -> list[bool]:
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 3)
    there = torch.nn.Linear(3, 3)
    there.load_state_dict(layer.state_dict())
    there.to("cuda")
    batch = torch.randn(2, 3)
    layer(batch).square().sum().backward()
    there(batch.to("cuda")).square().sum().backward()
    draws = [
        torch.rand(3, generator=torch.Generator(device).manual_seed(1), device=device)
        for device in ("cpu", "cuda")
    ]
    torch.manual_seed(2)
    first = torch.rand(3)
    torch.manual_seed(2)
    return [
        torch.equal(layer.weight.grad, there.weight.grad.cpu()),
        torch.equal(draws[0], draws[1].cpu()),
        torch.equal(first, torch.rand(3, device="cuda").cpu()),
    ]


def allocate() -> dict[str, int]:
    device = 1  # nothing else is there
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    values = torch.zeros(1024, device="cuda:1")
    (values + 1).sum()
    held, peak = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    del values
    torch.cuda.reset_peak_memory_stats(device)
    after, peak_after = torch.cuda.memory_allocated(device), torch.cuda.max_memory_allocated(device)
    return {
        "held": held - before,
        "peak": 4096 * ((peak - before) // 4096),  # a sum is four bytes more
        "after": after - before,
        "peak after": peak_after - before,
    }


def time_events() -> list[Any]:
    begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begun.record()
    torch.zeros(3, device="cuda")
    ended.record()
    try:
        begun.elapsed_time(ended)
    except RuntimeError as error:
        early = str(error).removeprefix("CUDA error: ")
    torch.cuda.synchronize()
    return [early, begun.elapsed_time(ended) > 0]
