"""Cross entropy and L1 over the vocabulary, chunk by chunk, with their gradients.

The same numbers as `losses.py`, which stays the definition; here nothing of size [M, V] is ever held.
With p the draft's softmax, q the teacher's, z the draft's logits, y the label:

    dCE/dz = p - onehot(y)        dL1/dz = p * (s - <p, s>),  s = sign(p - q)

Shapes: M supervised slots, U distinct teacher positions, H hidden size, R Markov rank, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.features import head_logits

# Logits held at a time, 4 bytes each. Fewer rows make narrow, slow matrix products.
CHUNK_ELEMENTS = {"cpu": 2**25, "cuda": 2**28}


def vocabulary_loss(
    hidden: Tensor,
    latent: Tensor | None,
    head: Tensor,
    markov_w2: Tensor | None,
    labels: Tensor,
    teacher_hidden: Tensor | None,
    which: Tensor | None,
    ce_weights: Tensor,
    l1_weights: Tensor,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted cross entropy plus weighted L1, summed over M slots.

    Args:
        hidden: block states `[M, H]`.
        latent: what the Markov head's W2 is applied to `[M, R]`, or None.
        head: `lm_head` weight `[V, H]`.
        markov_w2: `[V, R]`, or None.
        labels: `[M]`.
        teacher_hidden: the target's post-norm states at the distinct positions `[U, H]`, or None.
        which: the position of each slot, `[M]` in `[0, U)`, or None.
        ce_weights: `[M]`; what each slot's cross entropy counts in the sum.
        l1_weights: `[M]`; likewise for L1.
        softcap: the target's tanh soft-cap on its logits.
        logit_scale: what the target multiplies its logits by before that.

    Returns:
        The sum, which alone carries a gradient (into hidden, latent, head and markov_w2); and each
        slot's cross entropy `[M]` and L1 `[M]`, zero without a teacher.
    """
    if not torch.is_grad_enabled():  # a Function sees requires_grad even then, and would do the work
        hidden, head = hidden.detach(), head.detach()
        latent = None if latent is None else latent.detach()
        markov_w2 = None if markov_w2 is None else markov_w2.detach()
    operands = (hidden, latent, head, markov_w2, labels, teacher_hidden, which, ce_weights, l1_weights)
    return _VocabularyLoss.apply(*operands, softcap, logit_scale)


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
        which: Tensor | None,
        ce_weights: Tensor,
        l1_weights: Tensor,
        softcap: float | None,
        logit_scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        ce = torch.zeros(len(hidden), dtype=exact, device=hidden.device)
        l1 = torch.zeros_like(ce)
        needed = ctx.needs_input_grad
        grads = [
            torch.zeros(tensor.shape, dtype=exact, device=tensor.device) if need else None
            for tensor, need in zip((hidden, latent, head, markov_w2), needed[:4], strict=True)
        ]
        grad_hidden, grad_latent, grad_head, grad_w2 = grads
        # Slots in the order of their teacher positions, so that a chunk shares its few positions.
        order = (
            torch.arange(len(hidden), device=hidden.device) if which is None else which.argsort(stable=True)
        )
        rows = max(16, CHUNK_ELEMENTS.get(hidden.device.type, 2**25) // len(head))
        for chunk in order.split(rows) if len(order) else ():
            states = hidden[chunk].to(head.dtype)
            logits = head_logits(states, head, softcap, logit_scale)  # [C, V]
            slope = None if softcap is None else 1 - (logits / softcap) ** 2
            if latent is not None:
                logits += latent[chunk] @ markov_w2.T
            label = labels[chunk][:, None]
            logits -= logits.amax(-1, keepdim=True)
            label_logits = logits.gather(1, label)
            probs = logits.exp_()  # in place, and one exponential serves cross entropy and L1
            normaliser = probs.sum(-1, keepdim=True)
            ce[chunk] = (normaliser.log() - label_logits).squeeze(1)
            probs /= normaliser
            weights = ce_weights[chunk][:, None].to(exact)
            if teacher_hidden is None:
                grad = probs * weights
            else:
                first, last = which[chunk[0]], which[chunk[-1]] + 1
                teacher = head_logits(teacher_hidden[first:last], head, softcap, logit_scale).softmax(-1)
                difference = probs - teacher[which[chunk] - first]
                l1[chunk] = difference.abs().sum(-1)
                sign = difference.sign_()
                l1_weight = l1_weights[chunk][:, None].to(exact)
                inner = (probs * sign).sum(-1, keepdim=True)  # not einsum: autocast would round it to bf16
                # p * (l1_weight * (s - <p, s>) + ce_weight), in place
                grad = sign.mul_(l1_weight).add_(weights - l1_weight * inner).mul_(probs)
            grad.scatter_add_(1, label, -weights)
            if latent is not None and grad_latent is not None:
                grad_latent[chunk] = (grad.to(markov_w2.dtype) @ markov_w2).to(exact)
            if grad_w2 is not None:
                grad_w2.addmm_(grad.T, latent[chunk].to(exact))
            if slope is not None:
                grad *= slope
            if logit_scale != 1:
                grad *= logit_scale
            if grad_hidden is not None:
                grad_hidden[chunk] = (grad.to(head.dtype) @ head).to(exact)
            if grad_head is not None:
                grad_head.addmm_(grad.T, states.to(exact))
        ctx.save_for_backward(*grads)
        ctx.dtypes = [None if t is None else t.dtype for t in (hidden, latent, head, markov_w2)]
        ctx.mark_non_differentiable(ce, l1)
        return (ce_weights.to(exact) * ce).sum() + (l1_weights.to(exact) * l1).sum(), ce, l1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sum: Tensor, _ce: Tensor, _l1: Tensor) -> tuple:
        grads = [
            None if grad is None else (grad * grad_sum).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*grads, *[None] * 7)
