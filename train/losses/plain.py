"""The pass over the vocabulary in torch's own operations: on a CPU, and wherever there is no kernel.

Shapes: C rows of a chunk, U positions of theirs, R rank of the bias, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.features import product
from train.losses.chunks import Chunk, VocabularyPass, add_product
from train.losses.operands import SlotOperands
from train.runtime.compiled import compiled

# Logits worked on at a time between the products: what a CPU's caches hold.
PART_ELEMENTS = 2**19


class PlainPass(VocabularyPass):
    """The pass in torch's own operations.

    Args:
        compile_passes: as in `train.losses.fused.vocabulary_loss`.
    """

    def __init__(
        self,
        operands: SlotOperands,
        dtype: torch.dtype,
        matches: Tensor | None,
        needed: tuple[bool, ...],
        *,
        compile_passes: bool,
    ):
        super().__init__(operands, dtype, matches, needed)
        bias = operands.bias
        self.latent, self.bias_weight = (
            (None, None) if bias is None else (bias.latent.to(dtype), bias.weight.to(dtype))
        )
        # On a GPU its passes over the logits take as long as the products unless they are made one.
        self.differentiate = differentiate_compiled if compile_passes else differentiate

    def parts(self, chunk: Chunk) -> list[slice]:
        """Cut a chunk into what is worked on at a time between the products: it stays in a core's cache."""
        few = max(1, PART_ELEMENTS // len(self.head))
        if chunk.slots.is_cuda:
            few = len(chunk.slots)
        return [slice(start, start + few) for start in range(0, len(chunk.slots), few)]

    def add(self, chunk: Chunk) -> None:
        softcap, scale = self.operands.softcap, self.operands.logit_scale
        states = self.operands.hidden[chunk.slots].to(self.dtype)
        logits = product(states, self.head.T)  # [C, V]
        slope = _cap(logits, softcap, scale)
        teacher = self._teacher(chunk)  # [positions, V]
        latents, bias = self._add_bias(logits, chunk)
        if self.matches is not None and teacher is not None:
            self._match(logits, bias, teacher, chunk)
        gradient = self._differentiate(logits, bias, teacher, chunk)
        del logits
        self._add_bias_gradients(gradient, latents, bias, chunk)
        if slope is not None:
            gradient *= slope
        if scale != 1:
            gradient *= scale
        gradient = gradient.to(self.dtype)
        of_hidden, of_head, *_ = self.gradients
        if of_hidden is not None:
            of_hidden[chunk.slots] = product(gradient, self.head)
        if of_head is not None:
            add_product(of_head, gradient.T, states)

    def _teacher(self, chunk: Chunk) -> Tensor | None:
        """Compute the teacher's probabilities at the chunk's positions."""
        states = self.operands.teacher_hidden
        if states is None:
            return None
        logits = product(states[chunk.positions].to(self.dtype), self.teacher_head.T)
        _cap(logits, self.operands.softcap, self.operands.logit_scale)
        return torch.softmax(logits, -1, out=logits)

    def _add_bias(self, logits: Tensor, chunk: Chunk) -> tuple[Tensor | None, Tensor | None]:
        """Add a bias per slot to the logits in place; return latents, and a bias per position instead."""
        if self.operands.bias is None or self.latent is None or self.bias_weight is None:
            return None, None
        if self.operands.bias.by_position:
            latents = self.latent[chunk.positions]
            return latents, product(latents, self.bias_weight.T)
        latents = self.latent[chunk.slots]
        add_product(logits, latents, self.bias_weight.T)
        return latents, None

    def _match(self, logits: Tensor, bias: Tensor | None, teacher: Tensor, chunk: Chunk) -> None:
        """Note where draft and teacher have the same most likely token."""
        assert self.matches is not None
        tops = teacher.argmax(-1)
        for part in self.parts(chunk):
            scores = logits[part] if bias is None else logits[part] + bias[chunk.rows[part]]
            self.matches[chunk.slots[part]] = scores.argmax(-1) == tops[chunk.rows[part]]

    def _differentiate(
        self, logits: Tensor, bias: Tensor | None, teacher: Tensor | None, chunk: Chunk
    ) -> Tensor:
        """Compute a chunk's losses; return the gradients of its logits, which may be overwritten."""
        parts = self.parts(chunk)
        ce_weights, l1_weights, *soft_weights = self.weights.unbind()
        mass = None if self.mass is None else self.mass[chunk.positions]
        for part in parts:
            slots = chunk.slots[part]
            gradient, *losses = self.differentiate(
                logits[part],
                bias,
                teacher,
                chunk.rows[part],
                self.labels[slots, None],
                ce_weights[slots, None],
                l1_weights[slots, None],
                soft_weights[0][slots, None] if soft_weights else None,
                mass,
            )
            for out, found in zip(self.losses, losses, strict=False):
                out[slots] = found
            if len(parts) == 1:
                return gradient
            logits[part] = gradient
        return logits

    def _add_bias_gradients(
        self, gradient: Tensor, latents: Tensor | None, bias: Tensor | None, chunk: Chunk
    ) -> None:
        """Add the gradients of the bias's latent and weight. `bias` is overwritten."""
        *_, of_latent, of_weight = self.gradients
        if of_latent is None and of_weight is None:
            return
        assert latents is not None
        assert self.bias_weight is not None
        of_bias = gradient if bias is None else bias.zero_().index_add_(0, chunk.rows, gradient)
        of_bias = of_bias.to(self.dtype)
        if of_weight is not None:
            add_product(of_weight, of_bias.T, latents)
        if of_latent is not None:
            update = product(of_bias, self.bias_weight)
            if bias is not None:
                of_latent[chunk.positions] += update
            else:
                of_latent[chunk.slots] = update


def differentiate(
    logits: Tensor,
    bias: Tensor | None,
    teacher: Tensor | None,
    rows: Tensor,
    labels: Tensor,
    ce_weights: Tensor,
    l1_weights: Tensor,
    soft_weights: Tensor | None = None,
    mass: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Compute the losses of some logits, and the gradients of their weighted sum.

    Args:
        logits: `[C, V]`.
        bias: added to them first, a row per position, `[U, V]`; or None.
        teacher: probabilities, a row per position, `[U, V]`; or None.
        rows: the position of each row, `[C]`.
        labels: `[C, 1]`.
        ce_weights: `[C, 1]`.
        l1_weights: `[C, 1]`.
        soft_weights: `[C, 1]`, with a teacher; or None.
        mass: of each position, `[U]`, with a teacher; or None.

    Returns:
        Gradients `[C, V]`; and `[C]` each: cross entropy, L1 over these tokens, and soft cross entropy, None
        without its weights.
    """
    if bias is not None:
        logits = logits + bias[rows]
    highest, of_label = logits.amax(-1, keepdim=True), logits.gather(1, labels)
    probs = logits.softmax(-1)
    # The largest probability is one over the normaliser, so no other pass is needed to find that.
    log_largest = probs.amax(-1, keepdim=True).log()
    ce = (highest - log_largest - of_label).squeeze(1)
    soft_ce = None
    if teacher is None:
        l1 = torch.zeros_like(ce)
        gradient = probs.mul_(ce_weights)
    else:
        target = teacher[rows]
        difference = probs - (target if mass is None else target * mass[rows, None])
        l1 = difference.abs().sum(-1)
        sign = difference.sign_()
        inner = (probs * sign).sum(-1, keepdim=True)
        # p * (l1_weight * (s - <p, s>) + ce_weight)
        gradient = sign.mul_(l1_weights).add_(ce_weights - l1_weights * inner).mul_(probs)
        if soft_weights is not None:
            # A logit of -inf has no part where the teacher gives it none.
            below = torch.where(target == 0, target, target * (highest - logits))
            soft_ce = below.sum(-1) - log_largest.squeeze(1)
            gradient.addcmul_(probs - target, soft_weights)
    gradient.scatter_add_(1, labels, -ce_weights)
    return gradient, ce, l1, soft_ce


def differentiate_compiled(
    logits: Tensor, bias: Tensor | None, teacher: Tensor | None, *others: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Call `differentiate`, compiled for any number of rows and positions and one vocabulary.

    A vocabulary of unknown size would cost 64-bit indices and loads of single numbers.
    """
    for tensor in (logits, bias, teacher, *others):
        if tensor is not None:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
    run: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor | None]] = compiled(differentiate, dynamic=False)
    return run(logits, bias, teacher, *others)


def _cap(logits: Tensor, softcap: float | None, scale: float) -> Tensor | None:
    """Scale and soft-cap logits in place; return the factor of their gradient, None for 1."""
    if scale != 1:
        logits *= scale
    if softcap is None:
        return None
    logits.div_(softcap).tanh_()
    slope = 1 - logits**2
    logits *= softcap
    return slope
