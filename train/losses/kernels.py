"""Triton kernels of the loss. Importing this module needs triton; `train.losses.triton` calls them.

A program has one slot's row of V logits and goes over it three times:

1. the softmax's maximum and sum (and the cross entropy, and the most likely token);
2. with the teacher's: L1 = sum |p - q| and <p, s>, s = sign(p - q);
3. the gradient ce_weight * (p - onehot(y)) + l1_weight * p * (s - <p, s>), written over the logits in the
   dtype of the next product.

L1 needs both softmaxes' sums and its gradient needs <p, s>, so no two of these can be one. The second goes
backwards: it begins with what the first has left in the cache. The slots of a position are neighbours, so
that its teacher's row comes from the cache for all but one of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

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
    z, _slope = _load_with_slope(logits, bias, at, vocab, scale, cap, biased)
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
    q_top,
    q_inverse,
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
        difference = p - tl.exp(t - q_top) * q_inverse
        distance += tl.abs(difference)
        inner += tl.where(difference > 0, p, tl.where(difference < 0, -p, 0.0))
    return tl.sum(distance, 0), tl.sum(inner, 0)


@triton.jit
def _write_gradients(
    logits,
    gradient,
    bias,
    of_bias,
    teacher,
    top,
    inverse,
    q_top,
    q_inverse,
    label,
    ce_weight,
    l1_weight,
    factor,
    vocab: tl.constexpr,
    block: tl.constexpr,
    scale: tl.constexpr,
    cap: tl.constexpr,
    biased: tl.constexpr,
    taught: tl.constexpr,
):
    """Store p * (factor + l1_weight * sign(p - q)) - ce_weight * onehot(label), over logits and bias."""
    for first in range(0, vocab, block):
        at = first + tl.arange(0, block)
        z, slope = _load_with_slope(logits, bias, at, vocab, scale, cap, biased)
        p = tl.exp(z - top) * inverse
        g = p * factor
        if taught:
            t = _load(teacher, teacher, at, vocab, scale, cap, False)
            difference = p - tl.exp(t - q_top) * q_inverse
            sign = tl.where(difference > 0, l1_weight, tl.where(difference < 0, -l1_weight, 0.0))
            g = p * (sign + factor)
        g = tl.where(at == label, g - ce_weight, g)
        # Numbers of half the size are written over logits of this step and earlier ones: no thread may
        # write before all have read. Later steps' logits lie behind what is written.
        tl.debug_barrier()
        tl.store(gradient + at, (g * slope).to(gradient.dtype.element_ty), mask=at < vocab)
        if biased:
            tl.store(of_bias + at, g.to(gradient.dtype.element_ty), mask=at < vocab)


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
    label = tl.load(labels + row).to(tl.int32)
    of_label = _load(logits, bias, label, vocab, scale, cap, biased)
    top, total, token = _softmax(logits, bias, vocab, block, scale, cap, biased, match)
    inverse = 1.0 / total
    tl.store(ce + row, top - of_label + tl.log(total))
    factor = tl.load(ce_weights + row)
    l1_weight = 0.0
    ce_weight = factor
    q_top = 0.0
    q_inverse = 0.0
    if taught:
        position = tl.load(rows + row)
        teacher += position * vocab
        q_top = tl.load(teacher_highest + position)
        q_inverse = 1.0 / tl.load(teacher_total + position)
        l1_weight = tl.load(l1_weights + row)
        distance, inner = _distances(
            logits, bias, teacher, top, inverse, q_top, q_inverse, vocab, block, scale, cap, biased
        )
        tl.store(l1 + row, distance)
        factor -= l1_weight * inner
        if match:
            tl.store(matches + row, token == tl.load(teacher_best + position))
    if differentiate:
        _write_gradients(
            logits,
            gradient + start * stride,
            bias,
            of_bias + start * stride,
            teacher,
            top,
            inverse,
            q_top,
            q_inverse,
            label,
            ce_weight,
            l1_weight,
            factor,
            vocab,
            block,
            scale,
            cap,
            biased,
            taught,
        )
