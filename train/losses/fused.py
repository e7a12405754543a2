"""Cross entropy and L1 over the vocabulary, chunk by chunk, with their gradients.

The same numbers as `losses.py`, which stays the definition; here nothing of size [M, V] is ever held.
With p the draft's softmax, q the teacher's, z the draft's logits, y the label:

    dCE/dz = p - onehot(y)        dL1/dz = p * (s - <p, s>),  s = sign(p - q)

What depends on a label's position alone, the teacher and the vanilla head's bias, is computed once a
position: with many anchors a position serves up to K blocks.

Shapes: M supervised slots, U distinct positions, H hidden size, R Markov rank, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.features import at_least_fp32
from train.runtime.compiled import compiled

# Logits held at a time, 4 bytes each. Fewer rows make narrow, slow matrix products.
CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**26}
# Of these, what is worked on at a time between the products: what a CPU's caches hold.
PART_ELEMENTS = {"cpu": 2**19, "cuda": 2**26}


def vocabulary_loss(
    hidden: Tensor,
    latent: Tensor | None,
    head: Tensor,
    markov_w2: Tensor | None,
    labels: Tensor,
    teacher_hidden: Tensor | None,
    which: Tensor,
    ce_weights: Tensor,
    l1_weights: Tensor,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    *,
    latent_by_position: bool = False,
    compile_passes: bool = False,
    matches: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted cross entropy plus weighted L1, summed over M slots.

    Products with the vocabulary are computed in the autocast dtype where autocast is on, and summed up in
    fp32 where the device can; all else is fp32 (float64 for float64).

    Args:
        hidden: block states `[M, H]`.
        latent: what the Markov head's W2 is applied to, `[M, R]`, or None for no head.
        head: `lm_head` weight `[V, H]`.
        markov_w2: `[V, R]`, or None.
        labels: `[M]`.
        teacher_hidden: the target's post-norm states at the distinct positions `[U, H]`, or None.
        which: the position of each slot, `[M]` in `[0, U)`.
        ce_weights: `[M]`; what each slot's cross entropy counts in the sum.
        l1_weights: `[M]`; likewise for L1.
        softcap: the target's tanh soft-cap on its logits.
        logit_scale: what the target multiplies its logits by before that.
        latent_by_position: `latent` is one a position, `[U, R]`.
        compile_passes: let torch.compile fuse what is done between the products.
        matches: `[M]` bool, to be filled with whether the draft's most likely token is the teacher's.

    Returns:
        The sum, which alone carries a gradient (into hidden, latent, head and markov_w2); and each
        slot's cross entropy `[M]` and L1 `[M]`, zero without a teacher.
    """
    if not torch.is_grad_enabled():  # a Function sees requires_grad even then, and would do the work
        hidden, head = hidden.detach(), head.detach()
        latent = None if latent is None else latent.detach()
        markov_w2 = None if markov_w2 is None else markov_w2.detach()
    operands = (hidden, latent, head, markov_w2, labels, teacher_hidden, which, ce_weights, l1_weights)
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.dtype
    with torch.autocast(device, enabled=False):
        return _VocabularyLoss.apply(
            *operands, softcap, logit_scale, latent_by_position, compile_passes, dtype, matches
        )


def _product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right`, at least fp32: half-precision operands are summed up in fp32 where the device can."""
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left, right, out_dtype=torch.float32)
    return at_least_fp32(left @ right)


def _add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """`out += left @ right`."""
    if left.dtype == out.dtype:
        out.addmm_(left, right)
    else:
        out += _product(left, right)


def _cap(logits: Tensor, softcap: float | None, scale: float) -> Tensor | None:
    """Scale and soft-cap logits in place; what a gradient is multiplied by on its way back, None for 1."""
    if scale != 1:
        logits *= scale
    if softcap is None:
        return None
    logits.div_(softcap).tanh_()
    slope = 1 - logits**2
    logits *= softcap
    return slope


def _differentiate(
    logits: Tensor,
    bias: Tensor | None,
    teacher: Tensor | None,
    places: Tensor,
    labels: Tensor,
    ce_weights: Tensor,
    l1_weights: Tensor,
) -> tuple[Tensor, Tensor]:
    """Turn logits into the gradients of their weighted losses, in place.

    Args:
        logits: `[C, V]`.
        bias: added to them first, one a position, `[U, V]`; or None.
        teacher: probabilities, one a position, `[U, V]`; or None.
        places: the position of each row, `[C]`.
        labels: `[C, 1]`.
        ce_weights: `[C, 1]`.
        l1_weights: `[C, 1]`.

    Returns:
        Cross entropy and L1, `[C]`.
    """
    if bias is not None:
        logits += bias[places]
    highest, of_label = logits.amax(-1, keepdim=True), logits.gather(1, labels)
    probs = logits.softmax(-1)
    # The largest probability is one over the normaliser, so no other pass is needed to find that.
    ce = (highest - probs.amax(-1, keepdim=True).log() - of_label).squeeze(1)
    if teacher is None:
        l1 = torch.zeros_like(ce)
        logits.copy_(probs).mul_(ce_weights)
    else:
        difference = probs - teacher[places]
        l1 = difference.abs().sum(-1)
        sign = difference.sign_()
        inner = (probs * sign).sum(-1, keepdim=True)
        # p * (l1_weight * (s - <p, s>) + ce_weight)
        logits.copy_(sign.mul_(l1_weights).add_(ce_weights - l1_weights * inner)).mul_(probs)
    logits.scatter_add_(1, labels, -ce_weights)
    return ce, l1


def _spans(which: Tensor, rows: int) -> list[tuple[int, int]]:
    """For each chunk of `rows` ascending positions, the first one and the one behind the last."""
    if not len(which):
        return []
    firsts, lasts = which[::rows], torch.cat([which[rows - 1 :: rows], which[-1:]])[: -(-len(which) // rows)]
    return [(first, last + 1) for first, last in torch.stack([firsts, lasts], dim=1).tolist()]


class _VocabularyLoss(torch.autograd.Function):
    """Forward computes the gradients too: the weights are known, so one pass over the logits is enough."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        latent: Tensor | None,
        head: Tensor,
        markov_w2: Tensor | None,
        labels: Tensor,
        teacher_hidden: Tensor | None,
        which: Tensor,
        ce_weights: Tensor,
        l1_weights: Tensor,
        softcap: float | None,
        logit_scale: float,
        latent_by_position: bool,
        compile_passes: bool,
        dtype: torch.dtype,
        matches: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        exact, device = torch.promote_types(hidden.dtype, torch.float32), hidden.device
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, latent, head, markov_w2)]
        grads = [
            torch.zeros(tensor.shape, dtype=exact, device=device) if need else None
            for tensor, need in zip((hidden, latent, head, markov_w2), ctx.needs_input_grad[:4], strict=True)
        ]
        grad_hidden, grad_latent, grad_head, grad_w2 = grads
        head = head.to(dtype)
        latent, markov_w2 = (None if t is None else t.to(dtype) for t in (latent, markov_w2))
        ce_weights, l1_weights = ce_weights.to(exact), l1_weights.to(exact)
        ce = torch.zeros(len(hidden), dtype=exact, device=device)
        l1 = torch.zeros_like(ce)
        # Slots in the order of their positions, so that a chunk shares its few positions.
        which, order = which.sort(stable=True)
        rows = _even(len(hidden), max(16, CHUNK_ELEMENTS.get(device.type, 2**24) // len(head)))
        few = max(1, PART_ELEMENTS.get(device.type, 2**19) // len(head))
        # On a GPU its passes over the logits take as long as the products unless they are made one.
        differentiate = compiled(_differentiate) if compile_passes else _differentiate
        for number, (first, last) in enumerate(_spans(which, rows)):
            chunk = slice(number * rows, (number + 1) * rows)
            slots, places = order[chunk], which[chunk] - first
            states = hidden[slots].to(dtype)
            logits = _product(states, head.T)  # [C, V]
            slope = _cap(logits, softcap, logit_scale)
            # What is one a position: teacher and bias [last - first, V].
            teacher = bias = latents = None
            if teacher_hidden is not None:
                teacher = _product(teacher_hidden[first:last].to(dtype), head.T)
                _cap(teacher, softcap, logit_scale)
                teacher = torch.softmax(teacher, -1, out=teacher)
            if latent is not None:
                latents = latent[first:last] if latent_by_position else latent[slots]
                if latent_by_position:
                    bias = _product(latents, markov_w2.T)
                else:
                    _add_product(logits, latents, markov_w2.T)
            if matches is not None and teacher is not None:
                tops = teacher.argmax(-1)
                for part in _parts(len(slots), few):
                    scores = logits[part] if bias is None else logits[part] + bias[places[part]]
                    matches[slots[part]] = scores.argmax(-1) == tops[places[part]]
            # Up to the products with the gradients, a few rows at a time: those stay in a core's cache.
            for part in _parts(len(slots), few):
                some = slots[part]
                ce[some], l1[some] = differentiate(
                    logits[part],
                    bias,
                    teacher,
                    places[part],
                    labels[some, None],
                    ce_weights[some, None],
                    l1_weights[some, None],
                )
            grad = logits
            if grad_latent is not None or grad_w2 is not None:
                of_bias = grad if bias is None else bias.zero_().index_add_(0, places, grad)
                of_bias = of_bias.to(dtype)
                if grad_w2 is not None:
                    _add_product(grad_w2, of_bias.T, latents)
                if grad_latent is not None:
                    update = _product(of_bias, markov_w2)
                    if latent_by_position:
                        grad_latent[first:last] += update
                    else:
                        grad_latent[slots] = update
            if slope is not None:
                grad *= slope
            if logit_scale != 1:
                grad *= logit_scale
            grad = grad.to(dtype)
            if grad_hidden is not None:
                grad_hidden[slots] = _product(grad, head)
            if grad_head is not None:
                _add_product(grad_head, grad.T, states)
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(ce, l1)
        return (ce_weights * ce).sum() + (l1_weights * l1).sum(), ce, l1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sum: Tensor, _ce: Tensor, _l1: Tensor) -> tuple:
        grads = [
            None if grad is None else (grad * grad_sum).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*grads, *[None] * 11)


def _even(total: int, most: int) -> int:
    """Rows of a chunk so that `total` are cut into as few as `most` allows, and into equal ones."""
    chunks = max(1, -(-total // most))
    return max(1, -(-total // chunks))


def _parts(rows: int, few: int) -> list[slice]:
    return [slice(start, start + few) for start in range(0, rows, few)]
