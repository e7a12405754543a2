"""Copies between devices: those that the host waits for, and those that come late."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.gpu_less.pretend.ledger import LEDGER
from tests.gpu_less.pretend.machine import MACHINE
from tests.gpu_less.pretend.memory import is_pinned, pin, poison
from tests.gpu_less.pretend.tensors import PretendTensor, launch, unwrap, wait_for

aten = torch.ops.aten


def converted(source: Tensor, number: int | None, **kwargs: Any) -> Tensor:
    """Copy a tensor to another dtype or device.

    Args:
        number: of the GPU to copy to; None is the CPU.
        kwargs: of aten's `_to_copy`.
    """
    late = kwargs.pop("non_blocking", False)
    options = {**kwargs, "device": torch.device("cpu")}
    options.pop("pin_memory", None)
    elem = unwrap(source)
    out = aten._to_copy.default(elem, **options)
    if out.untyped_storage().data_ptr() == elem.untyped_storage().data_ptr() and out.numel():
        out = out.clone()
    if number is None:
        if late:  # torch allocates page-locked memory for it
            pin(out)
        _to_host(out, source, out.clone() if late else None)
        return out
    made = PretendTensor(out, number)
    if not isinstance(source, PretendTensor):
        _from_host(source, number, late=late)
    launch(aten._to_copy.default, (source,), {}, made, number)
    return made


def copied(to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Copy a tensor into another one, on another device."""
    if not isinstance(to, PretendTensor):
        values = source.elem.to(to.dtype, copy=True).expand(to.shape)
        to.copy_(values)
        _to_host(to, source, values if non_blocking else None)
        return to
    if not isinstance(source, PretendTensor):
        _from_host(source, to.number, late=non_blocking)
    to.elem.copy_(unwrap(source))
    launch(aten.copy_.default, (to, source), {}, to, to.number)
    return to


def _to_host(to: Tensor, source: PretendTensor, late: Tensor | None) -> None:
    """Order a copy to the CPU, whose values are in place already.

    Args:
        late: the values once more, for a copy that the host does not wait for.
    """
    launch(aten._to_copy.default, (source,), {}, None, source.number)
    if late is None:
        wait_for("copy to the host", source.number)
    elif not is_pinned(to):
        wait_for("copy to memory that is not page-locked", source.number)
    else:
        if not to.is_contiguous():
            wait_for("copy to strided memory", source.number)
        poison(to)
        MACHINE.stream(source.number).late(lambda: _carry_out(to, late))


def _carry_out(to: Tensor, values: Tensor) -> None:
    with torch.no_grad():
        to.copy_(values)


def _from_host(source: Tensor, number: int, *, late: bool) -> None:
    """Order a copy to a GPU: of values that are there already."""
    if not (late and is_pinned(source)):
        wait_for("copy to the GPU" if source.dim() else "number to the GPU", number)
        return
    stream, values = MACHINE.stream(number), source.detach().clone()

    def unchanged() -> None:
        if not torch.equal(*(each.flatten().view(torch.uint8) for each in (source, values))):
            LEDGER.fault("page-locked memory changed before it was copied", number)

    stream.late(unchanged)
