"""The pass over the vocabulary by Triton kernels between the products, for a frozen head.

A chunk is three steps: logits by a product, in fp32; losses and gradients by a kernel; the gradient of the
states by a product. The teacher's maximum and sum are computed once a position, by a kernel of their own. The
bias joins the products as further columns of states and head: a product by slot costs less than writing and
reading a bias by position (docs/performance.md has the arithmetic).

Shapes: C rows of a chunk, U positions of theirs, H hidden size, R rank of the bias, V vocabulary.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from pipeline.features import product
from train.losses.chunks import Chunk, VocabularyPass, add_product
from train.losses.kernels import BLOCK, SOFT_REGISTERS, WARPS, losses_kernel, teacher_kernel
from train.losses.operands import SlotOperands


class TritonPass(VocabularyPass):
    """The pass by kernels. The head must be frozen, and nothing may be float64."""

    def __init__(
        self, operands: SlotOperands, dtype: torch.dtype, matches: Tensor | None, needed: tuple[bool, ...]
    ):
        super().__init__(operands, dtype, matches, needed)
        assert self.gradients[1] is None, "the head is frozen"
        assert self.losses.dtype == torch.float32
        bias = operands.bias
        self.latent = None if bias is None else bias.latent.to(dtype)
        # Where nothing is between a product and a logit, the bias is a part of the product.
        self.joined = bias is not None and operands.softcap is None and operands.logit_scale == 1
        self.weight = _JOINED.weight(self.head, bias.weight, dtype) if self.joined else self.head
        self.bias_weight = None if bias is None or self.joined else bias.weight.to(dtype)

    def add(self, chunk: Chunk) -> None:
        hidden, latents = self.operands.hidden[chunk.slots].to(self.dtype), self._latents(chunk)
        states = _side_by_side(hidden, latents, self.weight.shape[1]) if self.joined else hidden
        logits = product(states, self.weight.T)  # [C, V]
        bias = None if self.bias_weight is None else product(latents, self.bias_weight.T)  # [C, V]
        teacher = self.operands.teacher_hidden
        if teacher is not None:
            teacher = product(teacher[chunk.positions].to(self.dtype), self.teacher_head.T)  # [U, V]
        self._launch(chunk, logits, bias, teacher)
        vocabulary = logits.shape[1]
        gradient = logits.view(self.dtype)[:, :vocabulary]
        of_bias = gradient if bias is None else bias.view(self.dtype)[:, :vocabulary]
        of_hidden, _, of_latent, of_weight = self.gradients
        if of_hidden is not None or (self.joined and of_latent is not None):
            of_states = product(gradient, self.weight)
            if of_hidden is not None:
                of_hidden[chunk.slots] = of_states[:, : hidden.shape[1]]
            if self.joined and of_latent is not None:
                end = hidden.shape[1] + latents.shape[1]
                self._add_to_latent(of_latent, of_states[:, hidden.shape[1] : end], chunk)
        if of_latent is not None and not self.joined:
            self._add_to_latent(of_latent, product(of_bias, self.bias_weight), chunk)
        if of_weight is not None:
            add_product(of_weight, of_bias.T, latents)

    def _latents(self, chunk: Chunk) -> Tensor | None:
        """Return the latent of each slot, `[C, R]`."""
        if self.operands.bias is None or self.latent is None:
            return None
        if self.operands.bias.by_position:
            return self.latent[chunk.positions][chunk.rows]
        return self.latent[chunk.slots]

    def _add_to_latent(self, of_latent: Tensor, gradient: Tensor, chunk: Chunk) -> None:
        assert self.operands.bias is not None
        if self.operands.bias.by_position:
            of_latent[chunk.positions].index_add_(0, chunk.rows, gradient)
        else:
            of_latent[chunk.slots] = gradient

    def _launch(self, chunk: Chunk, logits: Tensor, bias: Tensor | None, teacher: Tensor | None) -> None:
        """Compute a chunk's losses and, where any is needed, gradients in place of logits and bias."""
        rows, vocabulary = logits.shape
        fixed = {
            "vocab": vocabulary,
            "block": min(BLOCK, triton.next_power_of_2(vocabulary)),
            "scale": float(self.operands.logit_scale),
            "cap": float(self.operands.softcap or 0.0),
            "match": self.matches is not None and teacher is not None,
            "num_warps": WARPS,
        }
        simple = bias is None and not fixed["cap"]
        limits = {"maxnreg": SOFT_REGISTERS} if self.soft and simple else {}
        losses = logits.new_zeros(len(self.losses), rows)
        best = torch.empty(rows, dtype=torch.int32, device=logits.device)
        biased = logits if bias is None else bias
        with torch.cuda.device(logits.device) if logits.is_cuda else nullcontext():
            teacher_figures = _teacher_figures(teacher, logits, fixed)
            target_total = teacher_figures.total
            if self.mass is not None:
                target_total = target_total / self.mass[chunk.positions]
            losses_kernel[(rows,)](
                logits,
                logits.view(self.dtype),
                biased,
                biased.view(self.dtype),
                teacher_figures.logits,
                teacher_figures.highest,
                teacher_figures.total,
                target_total,
                chunk.rows,
                self.labels[chunk.slots],
                self.weights.index_select(1, chunk.slots),  # a row after the other, as `losses`
                losses,
                best,
                stride=vocabulary * logits.element_size() // self.dtype.itemsize,
                biased=bias is not None,
                taught=teacher is not None,
                soft=self.soft,
                differentiate=any(gradient is not None for gradient in self.gradients),
                **fixed,
                **limits,
            )
        self.losses[:, chunk.slots] = losses
        if self.matches is not None and teacher is not None:
            self.matches[chunk.slots] = best == teacher_figures.best[chunk.rows]


class _Teacher(NamedTuple):
    """The teacher's logits `[U, V]`, and each row's figures `[U]`."""

    logits: Tensor
    highest: Tensor
    total: Tensor
    """sum of exp(logit - highest)."""
    best: Tensor
    """The most likely token."""


def _teacher_figures(teacher: Tensor | None, absent: Tensor, fixed: dict) -> _Teacher:
    """Compute the figures of the teacher's logits `[U, V]`.

    Args:
        absent: stands for all of them where there is no teacher.
        fixed: what the kernel is compiled for.
    """
    if teacher is None:
        return _Teacher(absent, absent, absent, absent)
    highest, total = (teacher.new_empty(len(teacher)) for _ in range(2))
    best = torch.empty(len(teacher), dtype=torch.int32, device=teacher.device)
    teacher_kernel[(len(teacher),)](teacher, highest, total, best, **fixed)
    return _Teacher(teacher, highest, total, best)


class _Joined:
    """The weights of head and bias side by side, `[V, H + R]`, and zeros that fill rows up to 16 bytes.

    The head's part is copied when the head is another or has changed, the bias's part at every call. A change
    through the head's `.data` is not noticed. Head and copy are held until there is another.
    """

    def __init__(self) -> None:
        self._head: Tensor | None = None
        self._key: tuple | None = None
        self._weight: Tensor | None = None

    def weight(self, head: Tensor, bias_weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return both in a dtype. The tensor is valid until the next call."""
        if torch.is_inference_mode_enabled():  # its tensors can't be written later, nor tell of changes
            joined = torch.cat([head, bias_weight.to(dtype)], 1)
            return F.pad(joined, (0, -joined.shape[1] % 8))
        hidden, end = head.shape[1], head.shape[1] + bias_weight.shape[1]
        key = (head.data_ptr(), head._version, head.shape, head.dtype, head.device, dtype, end)
        if self._weight is None or key != self._key:
            self._weight = None  # before the next is made: both may not fit
            self._weight = torch.zeros(len(head), -(-end // 8) * 8, dtype=dtype, device=head.device)
            self._weight[:, :hidden] = head
            self._head, self._key = head.detach(), key  # while it is held, no other has its address
        self._weight[:, hidden:end] = bias_weight
        return self._weight


_JOINED = _Joined()


def _side_by_side(hidden: Tensor, latents: Tensor, width: int) -> Tensor:
    """Return states `[C, H]` and latents `[C, R]` in the columns of `_Joined`."""
    states = torch.cat([hidden, latents], 1)
    missing = width - states.shape[1]
    return F.pad(states, (0, missing)) if missing else states
