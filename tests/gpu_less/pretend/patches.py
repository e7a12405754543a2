"""Put the pretend device into this process's torch. There is no way back: use a process of its own."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch._dynamo  # these look at torch.cuda while they are imported, and should see what is really there
import torch.distributed.fsdp
import torch.distributed.tensor
import torch.profiler
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext, _device_constructors

from tests.gpu_less.pretend import cuda
from tests.gpu_less.pretend.copies import converted
from tests.gpu_less.pretend.ledger import LEDGER
from tests.gpu_less.pretend.machine import H100, MACHINE, Memory, Properties
from tests.gpu_less.pretend.memory import is_pinned, pin
from tests.gpu_less.pretend.operations import OnEveryThread
from tests.gpu_less.pretend.tensors import PretendTensor, cuda_number


def install(gpus: int = 1, name: str | None = None, properties: Properties = H100) -> None:
    """Give this process pretend GPUs, in place of any real ones.

    Args:
        gpus: how many there are.
        name: what `torch.cuda.get_device_name` says; None is the properties' own.
        properties: of each of them.
    """
    if torch.__dict__.get("pretend_device"):
        raise RuntimeError("the pretend device is installed already")
    torch.pretend_device = True
    _device_constructors()  # kept for good by torch: it has to hold the functions that are replaced below
    MACHINE.properties = replace(properties, name=name) if name else properties
    MACHINE.memory[:] = [Memory() for _ in range(gpus)]
    sys.modules["triton"] = None  # as if it were not installed: its kernels need a real GPU
    torch.__future__.set_swap_module_params_on_conversion(True)
    for known, value in cuda.names().items():
        setattr(torch.cuda, known, value)
    _patch_conversions()
    _patch_pinning()
    _patch_autocast()
    _patch_compiler()
    _patch_profiler()
    torch.Generator = _Generator
    _enter_on_every_thread()


class _Generator(torch.Generator):
    """A generator of a pretend GPU draws the CPU's numbers."""

    def __new__(cls, device: Any = "cpu") -> _Generator:
        made = super().__new__(cls, "cpu")
        made.said = torch.device(device)
        return made

    @property
    def device(self) -> torch.device:
        return self.said


def _enter_on_every_thread() -> None:
    OnEveryThread().__enter__()
    plain = threading.Thread.run

    def run(self: threading.Thread) -> None:
        with OnEveryThread():
            plain(self)

    threading.Thread.run = run


def _patch_conversions() -> None:
    plain = Tensor.to

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        copy = kwargs.pop("copy", False)
        if args and isinstance(args[0], Tensor):
            device, dtype, late, form = args[0].device, args[0].dtype, False, None
        else:
            device, dtype, late, form = torch._C._nn._parse_to(*args, **kwargs)
        options = {} if form is None else {"memory_format": form}
        if device is not None and device.type == "cuda":
            device = torch.device("cuda", MACHINE.number(device))
        if device is None or device == self.device or "meta" in (device.type, self.device.type):
            if device is not None and device.type == "meta":
                options["device"] = "meta"
            return plain(self, dtype=self.dtype if dtype is None else dtype, copy=copy, **options)
        return _Moved.apply(self, device, dtype or self.dtype, late, options)

    def cuda_(self: Tensor, device: Any = None, non_blocking: bool = False, **_: Any) -> Tensor:
        return to(self, torch.device("cuda", MACHINE.number(device)), non_blocking=non_blocking)

    Tensor.to, Tensor.cpu, Tensor.cuda = to, lambda self, **_: to(self, "cpu"), cuda_
    for name in ("tensor", "as_tensor"):
        setattr(torch, name, _making(getattr(torch, name)))


class _Moved(torch.autograd.Function):
    """A copy to another device, with its gradient copied back."""

    @staticmethod
    def forward(
        ctx: Any, source: Tensor, device: torch.device, dtype: torch.dtype, late: bool, options: dict
    ) -> Tensor:
        ctx.source = source.device, source.dtype
        number = cuda_number(device)
        return converted(source.detach(), number, dtype=dtype, non_blocking=late, **options)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        device, dtype = ctx.source
        return gradient.to(device, dtype), None, None, None, None


def _device_of_context() -> torch.device | None:
    """Return the device of `with torch.device("cuda")`, None outside of one."""
    modes = reversed(_get_current_function_mode_stack())
    return next((mode.device for mode in modes if isinstance(mode, DeviceContext)), None)


def _making(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return `torch.tensor` or `torch.as_tensor` for values that go to a GPU."""

    def make(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        number = cuda_number(_device_of_context() if device is None else device)
        if isinstance(data, PretendTensor):
            made = data.detach().clone() if plain.__name__ == "tensor" else data
            return made.to(device=device or data.device, dtype=kwargs.get("dtype") or data.dtype)
        if number is None:
            return plain(data, *args, device=device, **kwargs)
        kept = {k: v for k, v in kwargs.items() if k != "requires_grad"}
        made = plain(data, *args, device="cpu", **kept)
        return made.to(torch.device("cuda", number)).requires_grad_(kwargs.get("requires_grad", False))

    make.__name__ = plain.__name__
    return make


def _patch_pinning() -> None:
    for name in ("empty", "zeros", "ones", "full"):
        plain = getattr(torch, name)

        def make(*args: Any, _plain: Callable = plain, pin_memory: bool = False, **kwargs: Any) -> Tensor:
            made = _plain(*args, **kwargs)
            return pin(made) if pin_memory else made

        setattr(torch, name, make)
    Tensor.pin_memory = lambda self, *_: self if is_pinned(self) else pin(self.clone())
    Tensor.is_pinned = lambda self, *_: is_pinned(self)


def _patch_autocast() -> None:
    """Let autocast to the GPU be the CPU's: the inner tensors are there."""
    plain, enabled, dtype = torch.autocast, torch.is_autocast_enabled, torch.get_autocast_dtype

    class Autocast(plain):
        def __init__(self, device_type: str, *args: Any, **kwargs: Any):
            super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    for module in (torch, torch.amp, torch.amp.autocast_mode):
        module.autocast = Autocast
    torch.is_autocast_enabled = lambda device="cpu": enabled("cpu" if device == "cuda" else device)
    torch.get_autocast_dtype = lambda device: dtype("cpu" if device == "cuda" else device)


def _patch_compiler() -> None:
    def compile_(model: Any = None, **_: Any) -> Any:
        return model if model is not None else lambda function: function

    torch.compile = compile_
    torch.nn.Module.compile = lambda self, *_, **__: None


def _patch_profiler() -> None:
    """Let a trace show the CPU's work alone: this torch can't record another's, and says so each time."""
    activity, plain = torch.profiler.ProfilerActivity, torch.profiler.profile.__init__

    def init(self: Any, *, activities: Any = None, **kwargs: Any) -> None:
        plain(self, activities=[each for each in activities or () if each == activity.CPU], **kwargs)

    torch.profiler.profile.__init__ = init


def counts() -> dict[str, Any]:
    """Return what happened since the last call, ready for JSON."""
    taken = LEDGER.take()
    return {kind: [{**vars(note), "count": n} for note, n in found.items()] for kind, found in taken.items()}
