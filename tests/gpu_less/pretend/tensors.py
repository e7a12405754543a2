"""The tensor that says it is on a GPU, and the order of its kernels among the streams' launches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.gpu_less.pretend.ledger import LEDGER
from tests.gpu_less.pretend.machine import MACHINE
from tests.gpu_less.pretend.memory import footprint

# Notes of kernels, which open a context as everything does: the first few say enough.
KERNEL_NOTES = 50
NOTED: dict[int, int] = {}


class PretendTensor(Tensor):
    """A tensor on a pretend GPU: `elem` on the CPU, and the GPU's number."""

    elem: Tensor
    number: int
    run: ClassVar[Any]
    """Carries out an operation: `operations.run`, which needs this class."""

    @staticmethod
    def __new__(cls, elem: Tensor, number: int) -> PretendTensor:
        # Its inner device is the CPU: autograd asks a guard for any other, which this torch lacks for CUDA.
        made = Tensor._make_wrapper_subclass(
            cls,
            elem.size(),
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            device=elem.device,
            requires_grad=False,
        )
        made.elem, made.number = elem, number
        footprint(elem, number)
        return made

    def __init__(self, *_: Any) -> None:
        pass

    @property
    def device(self) -> torch.device:
        return torch.device("cuda", self.number)

    @property
    def is_cuda(self) -> bool:
        return True

    @property
    def is_cpu(self) -> bool:
        return False

    def get_device(self) -> int:
        return self.number

    def is_pinned(self, *_: Any) -> bool:
        return False

    def pin_memory(self, *_: Any) -> Tensor:
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")

    def numpy(self, **_: Any) -> Any:
        raise TypeError(
            f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() to copy the tensor "
            "to host memory first."
        )

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def data_ptr(self) -> int:
        return self.elem.data_ptr()

    def tolist(self) -> Any:
        wait_for("tolist", self.number)
        return self.elem.tolist()

    def record_stream(self, stream: Any) -> None:
        footprint(self.elem, self.number).recorded.add(stream.number)

    def __repr__(self, **_: Any) -> str:
        return f"{self.elem!r} on {self.device}"

    def __tensor_flatten__(self) -> tuple[list[str], int]:
        return ["elem"], self.number

    @staticmethod
    def __tensor_unflatten__(inner: Mapping[str, Tensor], number: int, *_: Any) -> PretendTensor:
        return PretendTensor(inner["elem"], number)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention and not _differentiable(args):
            return _attend(func, args, kwargs or {})
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        return cls.run(func, args, kwargs or {})


def _differentiable(values: Iterable[Any]) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors_in(values))


def _attend(func: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """Attend as one kernel. In parts, torch would make the causal mask on the inner device, the CPU."""
    inner = [unwrap(each) for each in args]
    number = next(tensor.number for tensor in tensors_in(args) if isinstance(tensor, PretendTensor))
    out = PretendTensor(func(*inner, **{name: unwrap(each) for name, each in kwargs.items()}), number)
    launch(torch.ops.aten.scaled_dot_product_attention.default, args, kwargs, out, number)
    return out


@dataclass(frozen=True)
class Effects:
    """Effects of an operation on its arguments, from its schema."""

    views: bool
    """It returns a view: nothing runs on the GPU."""
    written: frozenset[int | str]
    """Positions and names of the arguments that it writes to."""


@cache
def effects(func: Any) -> Effects:
    """Read an operation's schema."""
    if not hasattr(func, "_schema"):
        return Effects(False, frozenset())
    marked = [(i, a) for i, a in enumerate(func._schema.arguments) if a.alias_info is not None]
    written = {key for i, a in marked if a.alias_info.is_write for key in (i, a.name)}
    return Effects(bool(marked) and not written, frozenset(written))


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among arguments, and in lists of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (each for each in value if isinstance(each, Tensor))


def unwrap(value: Any) -> Any:
    """Return the CPU's tensor of a pretend one; anything else itself."""
    if isinstance(value, PretendTensor):
        return value.elem
    if isinstance(value, list | tuple):
        return type(value)([unwrap(each) for each in value])
    return value


def wait_for(what: str, number: int) -> None:
    """Let the host wait for the current stream of a GPU."""
    LEDGER.sync(what, number)
    MACHINE.wait(MACHINE.stream(number).clock)


def cuda_number(device: Any) -> int | None:
    """Return the number of a GPU; None for another device or none."""
    if device is None:
        return None
    device = torch.device(device)
    return MACHINE.number(device) if device.type == "cuda" else None


def launch(func: Any, args: tuple, kwargs: Mapping[str, Any], out: Any, number: int) -> None:
    """Order a kernel among the streams' launches, and what it reads and writes."""
    effect = effects(func)
    if effect.views:
        return
    if NOTED.get(number, 0) < KERNEL_NOTES:
        NOTED[number] = NOTED.get(number, 0) + 1
        LEDGER.context(f"run {func}", number)
    with MACHINE.lock:
        stream = MACHINE.stream(number)
        stream.launch()
        for key, value in (*enumerate(args), *kwargs.items()):
            for tensor in tensors_in((value,)):
                if isinstance(tensor, PretendTensor):
                    footprint(tensor.elem, number).use(stream, writes=key in effect.written)
        for tensor in tensors_in((out,)):
            if isinstance(tensor, PretendTensor):
                footprint(tensor.elem, number).use(stream, writes=True)
