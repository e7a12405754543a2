"""Memory of a pretend GPU: who uses it on which stream; and page-locked memory of the host.

What is known of a tensor's memory hangs on its storage, so that all views share it and it ends with it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.gpu_less.pretend.ledger import LEDGER
from tests.gpu_less.pretend.machine import MACHINE, Stream


class Footprint:
    """Uses of a storage: its last write, and the reads since, by the stream's number and launch."""

    def __init__(self, number: int, size: int):
        self.number, self.size = number, size
        self.home = MACHINE.stream(number)
        """The stream that it was allocated on: the allocator gives it out again in this one's order."""
        self.written: tuple[int, int] | None = None
        self.reads: dict[int, int] = {}
        self.recorded: set[int] = set()
        """Streams that `record_stream` named: the allocator waits for them."""
        MACHINE.memory[number].change(size)

    def use(self, stream: Stream, *, writes: bool) -> None:
        """Note a use by the launch that a stream has just begun; a race is a fault."""
        before = [] if self.written is None else [self.written]
        if writes:
            before += self.reads.items()
        for number, launch in before:
            if stream.clock.get(number, 0) < launch:
                LEDGER.fault("a race: nothing orders this after another stream's work", self.number)
        if writes:
            self.written, self.reads = (stream.number, stream.launches), {}
        else:
            self.reads[stream.number] = stream.launches

    def __del__(self) -> None:
        MACHINE.memory[self.number].change(-self.size)
        uses = [*self.reads.items(), *([self.written] if self.written else [])]
        for number, launch in uses:
            ordered = self.home.clock.get(number, 0) >= launch or MACHINE.host.get(number, 0) >= launch
            if number not in (self.home.number, *self.recorded) and not ordered:
                LEDGER.fault("memory is freed while another stream uses it: no record_stream", self.number)


def footprint(elem: Tensor, number: int) -> Footprint:
    """Return what is known of a tensor's memory on a GPU."""
    storage = elem.untyped_storage()
    found = getattr(storage, "footprint", None)
    if found is None:
        found = storage.footprint = Footprint(number, storage.nbytes())
    return found


def pin(tensor: Tensor) -> Tensor:
    """Note that a tensor's memory is page-locked."""
    LEDGER.context("allocate page-locked memory", MACHINE.device)
    tensor.untyped_storage().page_locked = True
    return tensor


def is_pinned(tensor: Tensor) -> bool:
    """Return whether a tensor of the CPU is page-locked."""
    return getattr(tensor.untyped_storage(), "page_locked", False)


def poison(tensor: Tensor) -> None:
    """Overwrite a tensor with values that no program means."""
    if tensor.dtype == torch.bool:
        tensor.fill_(True)
    elif tensor.dtype.is_floating_point and tensor.dtype.itemsize > 1:
        tensor.fill_(float("nan"))
    elif tensor.dtype.is_floating_point:  # torch fills no fp8
        tensor.view(torch.uint8).fill_(0x7F)
    else:
        tensor.fill_(torch.iinfo(tensor.dtype).max - 90)
