"""Triton kernels of the loss. Importing this module needs triton; `train.losses.triton` calls them.

A program has one slot's row of V logits and goes over it three times:

1. the softmax's maximum and sum (and the cross entropy, and the most likely token);
2. with the teacher's: L1 = sum |p - q| and <p, s>, s = sign(p - q); and, where it has a weight, -sum r log p,
   where r is q over the sum of q: they differ where the draft has a part of the target's vocabulary;
3. the gradient ce_weight * (p - onehot(y)) + l1_weight * p * (s - <p, s>) + soft_weight * (p - r), written
   over the logits in the dtype of the next product.

L1 needs both softmaxes' sums and its gradient needs <p, s>, so no two of these can be one. The second goes
backwards: it begins with what the first has left in the cache. The slots of a position are neighbours, so
that its teacher's row comes from the cache for all but one of them.

`gradient` and `of_bias` are the memory of `logits` and `bias`, with rows of `stride` numbers of the dtype of
the products. `weights` and `losses` have a row a term: cross entropy, L1, soft cross entropy. What an absent
operand is given for is not read.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Logits of a program's step, and its warps: 8 logits a thread are two 16-byte loads, and two programs of 512
# threads fill a multiprocessor, so that one loads while the other adds up.
BLOCK, WARPS = 4096, 16
# The compiler would take 88 with the soft cross entropy, and needs no memory for these in their place.
SOFT_REGISTERS = 64
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
    soft: tl.constexpr,
):
    """Return sum |p - q|, <p, sign(p - q)> and, with soft, sum e (top - z), e = exp(t - q_top).

    They are added up from the last token to the first.
    """
    distance = tl.zeros([block], tl.float32)
    inner = tl.zeros([block], tl.float32)
    below = tl.zeros([block], tl.float32)
    for back in range(0, vocab, block):
        at = (vocab - 1) // block * block - back + tl.arange(0, block)
        z = _load(logits, bias, at, vocab, scale, cap, biased)
        t = _load(teacher, teacher, at, vocab, scale, cap, False)
        p = tl.exp(z - top) * inverse
        e = tl.exp(t - q_top)
        difference = p - e * q_inverse
        distance += tl.abs(difference)
        inner += tl.where(difference > 0, p, tl.where(difference < 0, -p, 0.0))
        if soft:  # a logit of -inf has no part where the teacher gives it none
            below += tl.where(e == 0, 0.0, e * (top - z))
    return tl.sum(distance, 0), tl.sum(inner, 0), tl.sum(below, 0)


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
    pull,
    factor,
    vocab: tl.constexpr,
    block: tl.constexpr,
    scale: tl.constexpr,
    cap: tl.constexpr,
    biased: tl.constexpr,
    taught: tl.constexpr,
    soft: tl.constexpr,
):
    """Store the gradient over logits and bias.

    That is p * (factor + l1_weight * sign(p - q)) - ce_weight * onehot(label) - pull * exp(t - q_top).
    """
    for first in range(0, vocab, block):
        at = first + tl.arange(0, block)
        z, slope = _load_with_slope(logits, bias, at, vocab, scale, cap, biased)
        p = tl.exp(z - top) * inverse
        g = p * factor
        if taught:
            t = _load(teacher, teacher, at, vocab, scale, cap, False)
            e = tl.exp(t - q_top)
            difference = p - e * q_inverse
            sign = tl.where(difference > 0, l1_weight, tl.where(difference < 0, -l1_weight, 0.0))
            g = p * (sign + factor)
            if soft:
                g -= pull * e
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
    target_total,
    rows,
    labels,
    weights,
    losses,
    best,
    vocab: tl.constexpr,
    block: tl.constexpr,
    stride: tl.constexpr,
    scale: tl.constexpr,
    cap: tl.constexpr,
    biased: tl.constexpr,
    taught: tl.constexpr,
    soft: tl.constexpr,
    match: tl.constexpr,
    differentiate: tl.constexpr,
):
    """Store a slot's losses and most likely token, and the gradients of its logits and bias over these."""
    slots, row = tl.num_programs(0), tl.program_id(0).to(tl.int64)  # a chunk can have 2**31 logits and more
    logits += row * vocab
    bias += row * vocab
    label = tl.load(labels + row).to(tl.int32)
    of_label = _load(logits, bias, label, vocab, scale, cap, biased)
    top, total, token = _softmax(logits, bias, vocab, block, scale, cap, biased, match)
    inverse = 1.0 / total
    tl.store(losses + row, top - of_label + tl.log(total))
    if match:
        tl.store(best + row, token)
    ce_weight = tl.load(weights + row)
    factor = ce_weight
    q_top, q_inverse, l1_weight, pull = 0.0, 0.0, 0.0, 0.0
    if taught:
        position = tl.load(rows + row)
        teacher += position * vocab
        q_top = tl.load(teacher_highest + position)
        q_inverse = 1.0 / tl.load(target_total + position)
        l1_weight = tl.load(weights + slots + row)
        distance, inner, below = _distances(
            logits, bias, teacher, top, inverse, q_top, q_inverse, vocab, block, scale, cap, biased, soft
        )
        tl.store(losses + slots + row, distance)
        factor -= l1_weight * inner
        if soft:
            r_inverse = 1.0 / tl.load(teacher_total + position)
            soft_weight = tl.load(weights + 2 * slots + row)
            tl.store(losses + 2 * slots + row, below * r_inverse + tl.log(total))
            factor += soft_weight
            pull = soft_weight * r_inverse
    if differentiate:
        _write_gradients(
            logits,
            gradient + row * stride,
            bias,
            of_bias + row * stride,
            teacher,
            top,
            inverse,
            q_top,
            q_inverse,
            label,
            ce_weight,
            l1_weight,
            pull,
            factor,
            vocab,
            block,
            scale,
            cap,
            biased,
            taught,
            soft,
        )
