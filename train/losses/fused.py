"""Cross entropies and L1 over the vocabulary, chunk by chunk, with their gradients.

The same numbers as `train.losses.slots`, which stays the definition; here nothing of size [M, V] is ever
held. With p the draft's softmax, q the teacher's, z the draft's logits, y the label:

    dCE/dz = p - onehot(y)        dL1/dz = p * (s - <p, s>),  s = sign(p - q)
    dS/dz = p - q                 for the cross entropy with the teacher, S = -sum q log p

Where the draft has a part of the target's vocabulary and the teacher's mass m is known, s = sign(p - m q).

What depends on a label's position alone, the teacher and a bias from the token before it, is computed once
per position: with many anchors a position serves up to K blocks.

Shapes: M supervised slots, U distinct positions, H hidden size, R rank of the bias, V vocabulary, C rows of
a chunk.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.errors import ConfigError
from pipeline.features import operand_dtype
from train.losses.chunks import VocabularyPass
from train.losses.operands import LowRankBias, SlotOperands
from train.losses.plain import PlainPass
from train.losses.slots import SlotLosses

__all__ = ["LowRankBias", "SlotOperands", "VocabularyLosses", "resolve_kernel", "vocabulary_loss"]


@dataclass(frozen=True, kw_only=True)
class VocabularyLosses(SlotLosses):
    """Losses over the vocabulary of M slots, without a graph, and their weighted sum."""

    sum: Tensor
    """Alone carries a gradient, into `SlotOperands.differentiable()`."""


def resolve_kernel(kernel: str, device: torch.device, *, frozen: bool = True) -> str:
    """Return the kernel that a value of `loss.kernel` selects on a device, "torch" or "triton".

    The Triton kernel computes no gradient of the head: under "auto" a draft that trains its own gets "torch".

    Args:
        frozen: the output head is not trained.

    Raises:
        ConfigError: "triton" is asked for, and can't run.
    """
    obstacle = None if kernel == "torch" else _obstacle_to_triton(device, frozen)
    if kernel == "triton" and obstacle is not None:
        raise ConfigError(f'loss.kernel = "triton" needs {obstacle}: set it to "auto" or "torch"')
    return "torch" if kernel == "torch" or obstacle is not None else "triton"


def _obstacle_to_triton(device: torch.device, frozen: bool) -> str | None:
    """Return what the Triton kernel lacks, None for nothing."""
    if device.type != "cuda" or torch.version.cuda is None:
        return f"an NVIDIA GPU, got device {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"a GPU of compute capability 8.0 or more, got {capability[0]}.{capability[1]}"
    if importlib.util.find_spec("triton") is None:
        return "the package triton, which is not installed"
    return None if frozen else "a frozen head, but this draft trains its own"


def vocabulary_loss(
    operands: SlotOperands,
    *,
    kernel: str = "torch",
    compile_passes: bool = False,
    matches: Tensor | None = None,
) -> VocabularyLosses:
    """Compute the losses of M slots, and the gradients of their weighted sum.

    Products with the vocabulary are computed in the autocast dtype where autocast is on, and summed up in
    fp32 where the device can; all else is fp32 (float64 for float64, with the kernel "torch").

    Args:
        kernel: "torch" or "triton", as `resolve_kernel` returns it.
        compile_passes: let torch.compile fuse what "torch" does between the products.
        matches: `[M]` bool, to be filled with whether the draft's most likely token is the teacher's.
    """
    tensors = operands.differentiable()
    if not torch.is_grad_enabled():  # a Function sees requires_grad even then, and would do the work
        tensors = tuple(None if tensor is None else tensor.detach() for tensor in tensors)
    dtype = operand_dtype(operands.head)

    def make(operands: SlotOperands, needed: tuple[bool, ...]) -> VocabularyPass:
        if kernel == "torch":
            return PlainPass(operands, dtype, matches, needed, compile_passes=compile_passes)
        from train.losses.triton import TritonPass  # needs a package that not every machine has

        return TritonPass(operands, dtype, matches, needed)

    with torch.autocast(operands.hidden.device.type, enabled=False):
        total, losses = _VocabularyLoss.apply(*tensors, operands, make)
    ce, l1, *soft_ce = losses.unbind()
    return VocabularyLosses(
        sum=total,
        ce=ce,
        l1=None if operands.teacher_hidden is None else l1,
        soft_ce=soft_ce[0] if soft_ce else None,
    )


class _VocabularyLoss(torch.autograd.Function):
    """Forward computes the gradients too: the weights are known, so one pass over the logits is enough."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        latent: Tensor | None,
        weight: Tensor | None,
        operands: SlotOperands,
        make: Callable[[SlotOperands, tuple[bool, ...]], VocabularyPass],
    ) -> tuple[Tensor, Tensor]:
        tensors = (hidden, head, latent, weight)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
        run = make(operands.replaced(*tensors), ctx.needs_input_grad[:4])
        run.run()
        ctx.save_for_backward(*run.gradients)
        ctx.mark_non_differentiable(run.losses)
        return run.total(), run.losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sum: Tensor, _losses: Tensor) -> tuple:
        gradients = [
            None if gradient is None else (gradient * grad_sum).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*gradients, *[None] * 2)
