"""Effects of an operation besides its numbers: it waits, it refuses mixed devices, it is launched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map

from tests.gpu_less.pretend.copies import converted, copied
from tests.gpu_less.pretend.tensors import (
    PretendTensor,
    cuda_number,
    launch,
    tensors_in,
    unwrap,
    wait_for,
)

aten = torch.ops.aten

# Operations whose result's shape or value the host needs: it waits for it.
WAITING = {
    aten._local_scalar_dense.default: "item",
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten._unique2.default: "unique",
    aten.unique_dim.default: "unique",
    aten.unique_consecutive.default: "unique_consecutive",
    aten.equal.default: "equal",
    aten.bincount.default: "bincount",
    aten._linalg_check_errors.default: "a check of linalg",
    aten._linalg_eigh.default: "linalg.eigh",
    aten.multinomial.default: "multinomial",
}
INDEXING = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
# Where CUDA takes not even one value of the CPU.
STRICT = {aten.gather.default, aten.index_select.default, aten.scatter_.src, aten.index_copy_.default}
# Products of half precision that are summed up in another dtype: only CUDA has them.
WITH_DTYPE = {
    getattr(getattr(aten, name), form, None)
    for name in ("mm", "bmm", "addmm", "baddbmm")
    for form in ("dtype", "dtype_out")
} - {None}


class OnEveryThread(TorchDispatchMode):
    """Make tensors of factories, such as `torch.zeros(3, device="cuda")`, pretend ones."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Carry out an operation: on the CPU, and as a GPU would."""
    found = list(tensors_in((*args, *kwargs.values())))
    ours = [t for t in found if isinstance(t, PretendTensor)]
    number = cuda_number(kwargs.get("device"))
    if number is None and not ours:
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and _differentiating():
            out.untyped_storage().of_autograd = True
        return out
    if func is aten._has_compatible_shallow_copy_type.default:
        return len(found) == len(ours)
    if func is aten._to_copy.default:
        # Autograd asks for the CPU, the inner device, where it means the tensor's own.
        return converted(args[0], number if number is not None else args[0].number, **kwargs)
    if func is aten.copy_.default and _crosses(args[0], args[1]):
        return copied(*args, **kwargs)
    number = ours[0].number if ours else number
    if number is not None and kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    kwargs.pop("pin_memory", None)
    if len(found) > len(ours) and _differentiating():
        args, found, ours = _with_zeros(args, number)
    _check_devices(func, args, found, ours)
    _count_waits(func, args, kwargs, number)
    inner, named = [unwrap(a) for a in args], {k: unwrap(v) for k, v in kwargs.items()}
    if func is aten.histc.default:  # CUDA takes integers
        inner[0], number_type = inner[0].float(), inner[0].dtype
        out = func(*inner, **named).to(number_type)
    else:
        out = _product(*inner, **named) if func in WITH_DTYPE else func(*inner, **named)
    known = {id(t.elem): t for t in ours}

    def wrap(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return known[id(value)] if id(value) in known else PretendTensor(value, number)

    out = wrap(out) if isinstance(out, Tensor) else tree_map(wrap, out)
    launch(func, args, kwargs, out, number)
    return return_and_correct_aliasing(func, args, kwargs, out) if ours and hasattr(func, "_schema") else out


def _product(*operands: Any, out: Tensor | None = None) -> Tensor:
    """Multiply two matrices, the last but the dtype; add a third if one comes before them."""
    *added, left, right, dtype = operands
    half = (torch.bfloat16, torch.float16)
    if left.dtype not in half or right.dtype != left.dtype or dtype not in (left.dtype, torch.float32):
        raise RuntimeError(f"out_dtype {dtype} does not go with {left.dtype} and {right.dtype}")
    result = sum((each.to(dtype) for each in added), start=left.to(dtype) @ right.to(dtype))
    return result if out is None else out.copy_(result)


def _differentiating() -> bool:
    """Return whether a backward is running in this thread."""
    return torch._C._current_graph_task_id() >= 0


def _with_zeros(args: tuple, number: int) -> tuple[tuple, list[Tensor], list[PretendTensor]]:
    """Put tensors that autograd made, zeros where no gradient came, on the GPU where it means them to be."""

    def place(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(place(each) for each in value)
        plain = isinstance(value, Tensor) and not isinstance(value, PretendTensor)
        if plain and getattr(value.untyped_storage(), "of_autograd", False):
            return PretendTensor(value, number)
        return value

    args = place(args)
    found = list(tensors_in(args))
    return args, found, [t for t in found if isinstance(t, PretendTensor)]


def _crosses(to: Any, source: Any) -> bool:
    return getattr(to, "number", None) != getattr(source, "number", None)


def _check_devices(func: Any, args: tuple, found: Sequence[Tensor], ours: Sequence[PretendTensor]) -> None:
    """Raise where CUDA would, for tensors on several devices."""
    numbers = {t.number for t in ours}
    others = [t for t in found if not isinstance(t, PretendTensor)]
    if func in INDEXING and ours and isinstance(args[0], PretendTensor):
        indices = {id(i) for i in args[1] if i is not None}
        own = [t for t in others if id(t) in indices and t.dim()]
        if own:  # CUDA copies them over, from memory that is not page-locked
            wait_for("indices of the CPU", args[0].number)
        others = [t for t in others if id(t) not in indices]
    far = [t for t in others if t.dim() or func in STRICT] if ours else []
    if len(numbers) > 1 or far:
        devices = ", ".join(sorted({str(t.device) for t in (*ours, *far)}))
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {devices}! "
            f"({func}, {[tuple(t.shape) for t in found]})"
        )


def _count_waits(func: Any, args: tuple, kwargs: Mapping[str, Any], number: int) -> None:
    if func in WAITING:
        wait_for(WAITING[func], number)
    elif func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
        wait_for("repeat_interleave", number)
    elif func in INDEXING:
        masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
        value = args[2] if len(args) > 2 else None
        if masks and not (value is not None and value.numel() == 1 and not isinstance(value, PretendTensor)):
            for _ in masks:  # a number of the CPU goes through masked_fill, without a wait
                wait_for("boolean index", number)


PretendTensor.run = staticmethod(run)
