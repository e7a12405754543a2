"""The pass over the vocabulary by one Triton kernel between the products, for a frozen head.

A chunk is three steps: logits by a product, in fp32; losses and gradients by the kernel; the gradient of the
states by a product. One program of the kernel has one slot's row of V logits and goes over it three times:

1. the softmax's maximum and sum (and the cross entropy, and the most likely token);
2. with the teacher's: L1 = sum |p - q| and <p, s>, s = sign(p - q);
3. the gradient ce_weight * (p - onehot(y)) + l1_weight * p * (s - <p, s>), written over the logits in the
   dtype of the next product.

L1 needs both softmaxes' sums and its gradient needs <p, s>, so no two of these can be one. The second goes
backwards: it begins with what the first has left in the cache. The slots of a position are neighbours, so
that its teacher's row comes from the cache for all but one; the teacher's maximum and sum are computed once a
position, by a kernel of its own. The bias joins the products as further columns of states and head: a product
by slot costs less than reading and writing a bias by position (docs/performance.md has the arithmetic).

Shapes: C rows of a chunk, U positions of theirs, H hidden size, R rank of the bias, V vocabulary.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from train.losses.chunks import Chunk, VocabularyPass, add_product, product
from train.losses.operands import SlotOperands

# Logits of a program's step, and its warps: 8 logits a thread are two 16-byte loads, and two programs of 512
# threads fill a multiprocessor, so that one loads while the other adds up.
BLOCK, WARPS = 4096, 16
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def _tanh(x):
    """Return tanh(x), and its derivative without cancellation."""
    e = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -size, size), 4.0 * e / ((1.0 + e) * (1.0 + e))


@triton.jit
def _load_with_slope(
    logits, bias, at, vocab: tl.constexpr, scale: tl.constexpr, cap: tl.constexpr, biased: tl.constexpr
):
    """Return scaled and capped logits with their bias, -inf after the last, and the slope of that."""
    inside = at < vocab
    z = tl.load(logits + at, mask=inside, other=0.0)
    slope = scale
    if scale != 1.0:
        z = z * scale
    if cap > 0.0:
        tanh, derivative = _tanh(z / cap)
        z = tanh * cap
        slope = derivative * scale
    if biased:
        z += tl.load(bias + at, mask=inside, other=0.0)
    return tl.where(inside, z, float("-inf")), slope


@triton.jit
def _load(
    logits, bias, at, vocab: tl.constexpr, scale: tl.constexpr, cap: tl.constexpr, biased: tl.constexpr
):
    """Return scaled and capped logits with their bias, -inf after the last."""
    z, slope = _load_with_slope(logits, bias, at, vocab, scale, cap, biased)
    return z


@triton.jit
def _softmax(
    logits,
    bias,
    vocab: tl.constexpr,
    block: tl.constexpr,
    scale: tl.constexpr,
    cap: tl.constexpr,
    biased: tl.constexpr,
    match: tl.constexpr,
):
    """Return the maximum, the sum of exp(z - maximum) and, with match, the first token with the maximum."""
    highest = tl.full([block], LOWEST, tl.float32)
    total = tl.zeros([block], tl.float32)
    best = tl.full([block], vocab, tl.int32)
    for start in tl.range(0, vocab, block, loop_unroll_factor=2):  # more loads on their way at a time
        at = start + tl.arange(0, block)
        z = _load(logits, bias, at, vocab, scale, cap, biased)
        change = z - highest
        smaller = tl.exp(-tl.abs(change))
        total = tl.where(change > 0, total * smaller + 1.0, total + smaller)
        if match:
            best = tl.where(change > 0, at, best)
        highest = tl.maximum(highest, z)
    top = tl.max(highest, 0)
    total = tl.sum(total * tl.exp(highest - top), 0)
    token = 0
    if match:
        token = tl.min(tl.where(highest == top, best, vocab), 0)
    return top, total, token


@triton.jit
def teacher_kernel(
    logits,
    highest,
    total,
    best,
    vocab: tl.constexpr,
    block: tl.constexpr,
    scale: tl.constexpr,
    cap: tl.constexpr,
    match: tl.constexpr,
):
    """Store a position's maximum, sum of exp(z - maximum) and most likely token."""
    row = tl.program_id(0)
    logits += row.to(tl.int64) * vocab
    top, exps, token = _softmax(logits, logits, vocab, block, scale, cap, False, match)
    tl.store(highest + row, top)
    tl.store(total + row, exps)
    if match:
        tl.store(best + row, token)


@triton.jit
def _distances(
    logits,
    bias,
    teacher,
    top,
    inverse,
    teacher_top,
    teacher_inverse,
    vocab: tl.constexpr,
    block: tl.constexpr,
    scale: tl.constexpr,
    cap: tl.constexpr,
    biased: tl.constexpr,
):
    """Return sum |p - q| and <p, sign(p - q)>, added up from the last token to the first."""
    distance = tl.zeros([block], tl.float32)
    inner = tl.zeros([block], tl.float32)
    for back in range(0, vocab, block):
        at = (vocab - 1) // block * block - back + tl.arange(0, block)
        z = _load(logits, bias, at, vocab, scale, cap, biased)
        t = _load(teacher, teacher, at, vocab, scale, cap, False)
        p = tl.exp(z - top) * inverse
        difference = p - tl.exp(t - teacher_top) * teacher_inverse
        distance += tl.abs(difference)
        inner += tl.where(difference > 0, p, tl.where(difference < 0, -p, 0.0))
    return tl.sum(distance, 0), tl.sum(inner, 0)


@triton.jit
def losses_kernel(
    logits,
    gradient,
    bias,
    of_bias,
    teacher,
    teacher_highest,
    teacher_total,
    teacher_best,
    rows,
    labels,
    ce_weights,
    l1_weights,
    ce,
    l1,
    matches,
    vocab: tl.constexpr,
    block: tl.constexpr,
    stride: tl.constexpr,
    scale: tl.constexpr,
    cap: tl.constexpr,
    biased: tl.constexpr,
    taught: tl.constexpr,
    match: tl.constexpr,
    differentiate: tl.constexpr,
):
    """Store a slot's losses, and the gradients of its logits and bias over these themselves.

    `gradient` and `of_bias` are the memory of `logits` and `bias`, with rows of stride numbers of the dtype
    of the products. What an absent operand is given for is not read.
    """
    row = tl.program_id(0)
    start = row.to(tl.int64)  # a chunk can have 2**31 logits and more
    logits += start * vocab
    bias += start * vocab
    label = tl.load(labels + row)
    of_label = _load(logits, bias, label, vocab, scale, cap, biased)
    top, total, token = _softmax(logits, bias, vocab, block, scale, cap, biased, match)
    inverse = 1.0 / total
    tl.store(ce + row, top - of_label + tl.log(total))
    factor = tl.load(ce_weights + row)
    l1_weight = 0.0
    ce_weight = factor
    teacher_top = 0.0
    teacher_inverse = 0.0
    if taught:
        position = tl.load(rows + row)
        teacher += position * vocab
        teacher_top = tl.load(teacher_highest + position)
        teacher_inverse = 1.0 / tl.load(teacher_total + position)
        l1_weight = tl.load(l1_weights + row)
        distance, inner = _distances(
            logits,
            bias,
            teacher,
            top,
            inverse,
            teacher_top,
            teacher_inverse,
            vocab,
            block,
            scale,
            cap,
            biased,
        )
        tl.store(l1 + row, distance)
        factor -= l1_weight * inner
        if match:
            tl.store(matches + row, token == tl.load(teacher_best + position))
    if differentiate:
        gradient += start * stride
        of_bias += start * stride
        for first in range(0, vocab, block):
            at = first + tl.arange(0, block)
            z, slope = _load_with_slope(logits, bias, at, vocab, scale, cap, biased)
            p = tl.exp(z - top) * inverse
            g = p * factor
            if taught:
                t = _load(teacher, teacher, at, vocab, scale, cap, False)
                difference = p - tl.exp(t - teacher_top) * teacher_inverse
                sign = tl.where(difference > 0, l1_weight, tl.where(difference < 0, -l1_weight, 0.0))
                g = p * (sign + factor)
            g = tl.where(at == label, g - ce_weight, g)
            # Numbers of half the size are written over logits of this step and earlier ones: no thread may
            # write before all have read. Later steps' logits lie behind what is written.
            tl.debug_barrier()
            tl.store(gradient + at, (g * slope).to(gradient.dtype.element_ty), mask=at < vocab)
            if biased:
                tl.store(of_bias + at, g.to(gradient.dtype.element_ty), mask=at < vocab)


class TritonPass(VocabularyPass):
    """The pass by the kernels above. The head must be frozen, and nothing may be float64."""

    def __init__(
        self, operands: SlotOperands, dtype: torch.dtype, matches: Tensor | None, needed: tuple[bool, ...]
    ):
        super().__init__(operands, dtype, matches, needed)
        assert self.gradients[1] is None, "the head is frozen"
        assert self.ce.dtype == torch.float32
        bias = operands.bias
        self.head = operands.head.to(dtype)
        self.latent, self.bias_weight = (
            (None, None) if bias is None else (bias.latent.to(dtype), bias.weight.to(dtype))
        )
        # Nothing is between a product and a logit: the bias is then a part of the product.
        self.joined = bias is not None and operands.softcap is None and operands.logit_scale == 1
        self.weight = torch.cat([self.head, self.bias_weight], 1) if self.joined else self.head

    def add(self, chunk: Chunk) -> None:
        hidden = self.operands.hidden[chunk.slots].to(self.dtype)
        latents = self._latents(chunk)
        logits = product(torch.cat([hidden, latents], 1) if self.joined else hidden, self.weight.T)  # [C, V]
        bias = None if latents is None or self.joined else product(latents, self.bias_weight.T)  # [C, V]
        states = self.operands.teacher_hidden
        teacher = None if states is None else product(states[chunk.positions].to(self.dtype), self.head.T)
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
                self._add_to_latent(of_latent, of_states[:, hidden.shape[1] :], chunk)
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
        top = self.matches is not None and teacher is not None
        fixed = {
            "vocab": vocabulary,
            "block": min(BLOCK, triton.next_power_of_2(vocabulary)),
            "scale": float(self.operands.logit_scale),
            "cap": float(self.operands.softcap or 0.0),
            "match": top,
            "num_warps": WARPS,
        }
        ce, l1 = logits.new_empty(rows), logits.new_zeros(rows)
        agrees = torch.empty(rows, dtype=torch.bool, device=logits.device)
        biased = logits if bias is None else bias
        with torch.cuda.device(logits.device) if logits.is_cuda else nullcontext():
            of_teacher = _teacher_figures(teacher, logits, fixed)
            losses_kernel[(rows,)](
                logits,
                logits.view(self.dtype),
                biased,
                biased.view(self.dtype),
                *of_teacher,
                chunk.rows,
                self.operands.labels[chunk.slots],
                self.ce_weights[chunk.slots],
                self.l1_weights[chunk.slots],
                ce,
                l1,
                agrees,
                stride=vocabulary * logits.element_size() // self.dtype.itemsize,
                biased=bias is not None,
                taught=teacher is not None,
                differentiate=any(gradient is not None for gradient in self.gradients),
                **fixed,
            )
        self.ce[chunk.slots], self.l1[chunk.slots] = ce, l1
        if top:
            self.matches[chunk.slots] = agrees


def _teacher_figures(
    teacher: Tensor | None, absent: Tensor, fixed: dict
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the teacher's logits `[U, V]`, and each row's maximum, sum and most likely token.

    Args:
        absent: stands for all of them where there is no teacher.
        fixed: what the kernel is compiled for.
    """
    if teacher is None:
        return absent, absent, absent, absent
    highest, total = (teacher.new_empty(len(teacher)) for _ in range(2))
    best = torch.empty(len(teacher), dtype=torch.int32, device=teacher.device)
    teacher_kernel[(len(teacher),)](teacher, highest, total, best, **fixed)
    return teacher, highest, total, best
