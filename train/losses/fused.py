"""Cross entropy and L1 over the vocabulary, chunk by chunk, with their gradients.

The same numbers as `train.losses.slots`, which stays the definition; here nothing of size [M, V] is ever
held. With p the draft's softmax, q the teacher's, z the draft's logits, y the label:

    dCE/dz = p - onehot(y)        dL1/dz = p * (s - <p, s>),  s = sign(p - q)

What depends on a label's position alone, the teacher and a bias from the token before it, is computed once
per position: with many anchors a position serves up to K blocks.

Shapes: M supervised slots, U distinct positions, H hidden size, R rank of the bias, V vocabulary, C rows of
a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
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


@dataclass(frozen=True, kw_only=True)
class LowRankBias:
    """A bias on each slot's logits: `weight @ latent`."""

    latent: Tensor
    """`[M, R]`, or `[U, R]` where it depends on the position alone."""
    weight: Tensor
    """`[V, R]`."""
    by_position: bool
    """`latent` has a row per position, not per slot."""


@dataclass(frozen=True, kw_only=True)
class SlotOperands:
    """Everything that the losses of M slots are computed from."""

    hidden: Tensor
    """Block states `[M, H]`."""
    head: Tensor
    """The output head's weight `[V, H]`."""
    labels: Tensor
    """`[M]`."""
    positions: Tensor
    """Number of the distinct position of each slot's label, `[M]` in `[0, U)`."""
    ce_weights: Tensor
    """`[M]`; each slot's cross entropy counts so much in the sum."""
    l1_weights: Tensor
    """`[M]`; likewise for L1."""
    teacher_hidden: Tensor | None = None
    """The target's post-norm states at the distinct positions `[U, H]`; None for no teacher."""
    bias: LowRankBias | None = None
    softcap: float | None = None
    """The target's tanh soft-cap on its logits."""
    logit_scale: float = 1.0
    """The target multiplies its logits by this before the soft-cap."""

    def differentiable(self) -> tuple[Tensor | None, ...]:
        """Return what a gradient may flow into: hidden, head, the bias's latent and weight."""
        bias = self.bias
        return self.hidden, self.head, None if bias is None else bias.latent, bias and bias.weight

    def replaced(
        self, hidden: Tensor, head: Tensor, latent: Tensor | None, weight: Tensor | None
    ) -> SlotOperands:
        """Return the same operands with other tensors for `differentiable`."""
        bias = None if self.bias is None else replace(self.bias, latent=latent, weight=weight)
        return replace(self, hidden=hidden, head=head, bias=bias)


def vocabulary_loss(
    operands: SlotOperands, *, compile_passes: bool = False, matches: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted cross entropy plus weighted L1, summed over M slots.

    Products with the vocabulary are computed in the autocast dtype where autocast is on, and summed up in
    fp32 where the device can; all else is fp32 (float64 for float64).

    Args:
        compile_passes: let torch.compile fuse what is done between the products.
        matches: `[M]` bool, to be filled with whether the draft's most likely token is the teacher's.

    Returns:
        The sum, which alone carries a gradient (into `operands.differentiable()`); and each slot's cross
        entropy `[M]` and L1 `[M]`, zero without a teacher.
    """
    tensors = operands.differentiable()
    if not torch.is_grad_enabled():  # a Function sees requires_grad even then, and would do the work
        tensors = tuple(None if tensor is None else tensor.detach() for tensor in tensors)
    device = operands.hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else operands.head.dtype
    with torch.autocast(device, enabled=False):
        return _VocabularyLoss.apply(*tensors, operands, dtype, compile_passes, matches)


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
        dtype: torch.dtype,
        compile_passes: bool,
        matches: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tensors = (hidden, head, latent, weight)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors]
        run = _Pass(operands.replaced(*tensors), dtype, compile_passes, matches, ctx.needs_input_grad[:4])
        for chunk in run.chunks():
            run.add(chunk)
        ctx.save_for_backward(*run.gradients)
        ctx.mark_non_differentiable(run.ce, run.l1)
        return (run.ce_weights * run.ce).sum() + (run.l1_weights * run.l1).sum(), run.ce, run.l1

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sum: Tensor, _ce: Tensor, _l1: Tensor) -> tuple:
        gradients = [
            None if gradient is None else (gradient * grad_sum).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return (*gradients, *[None] * 4)


@dataclass(frozen=True)
class _Chunk:
    """Slots whose logits are held together, in the order of their positions."""

    slots: Tensor
    """Numbers of the slots, `[C]`."""
    positions: slice
    """The distinct positions that they have."""
    rows: Tensor
    """Each slot's position, counted from the first of these, `[C]`."""


class _Pass:
    """One pass over the vocabulary: losses of all slots, and the gradients of their weighted sum.

    Args:
        operands: what the losses are computed from.
        dtype: of the products with the vocabulary.
        compile_passes: as in `vocabulary_loss`.
        matches: as in `vocabulary_loss`.
        needed: which of `operands.differentiable()` need a gradient.
    """

    def __init__(
        self,
        operands: SlotOperands,
        dtype: torch.dtype,
        compile_passes: bool,
        matches: Tensor | None,
        needed: tuple[bool, ...],
    ):
        hidden, head, latent, weight = operands.differentiable()
        assert hidden is not None
        assert head is not None
        exact = torch.promote_types(hidden.dtype, torch.float32)
        self.gradients = [
            torch.zeros(tensor.shape, dtype=exact, device=hidden.device) if need else None
            for tensor, need in zip((hidden, head, latent, weight), needed, strict=True)
        ]
        self.operands, self.dtype, self.matches = operands, dtype, matches
        self.head = head.to(dtype)
        self.latent, self.bias_weight = (None if t is None else t.to(dtype) for t in (latent, weight))
        self.ce_weights, self.l1_weights = operands.ce_weights.to(exact), operands.l1_weights.to(exact)
        self.ce = torch.zeros(len(hidden), dtype=exact, device=hidden.device)
        self.l1 = torch.zeros_like(self.ce)
        # On a GPU its passes over the logits take as long as the products unless they are made one.
        self.differentiate = compiled(_differentiate) if compile_passes else _differentiate

    def chunks(self) -> Iterator[_Chunk]:
        """Cut the slots, sorted by position, so that those of a chunk share its few positions."""
        device = self.operands.hidden.device.type
        positions, order = self.operands.positions.sort(stable=True)
        rows = _even(len(order), max(16, CHUNK_ELEMENTS.get(device, 2**24) // len(self.head)))
        for number, (first, end) in enumerate(_spans(positions, rows)):
            some = slice(number * rows, (number + 1) * rows)
            yield _Chunk(order[some], slice(first, end), positions[some] - first)

    def parts(self, chunk: _Chunk) -> list[slice]:
        """Cut a chunk into what is worked on at a time between the products: it stays in a core's cache."""
        device = self.operands.hidden.device.type
        few = max(1, PART_ELEMENTS.get(device, 2**19) // len(self.head))
        return [slice(start, start + few) for start in range(0, len(chunk.slots), few)]

    def add(self, chunk: _Chunk) -> None:
        """Compute the losses of a chunk's slots, and add their gradients."""
        softcap, scale = self.operands.softcap, self.operands.logit_scale
        states = self.operands.hidden[chunk.slots].to(self.dtype)
        logits = _product(states, self.head.T)  # [C, V]
        slope = _cap(logits, softcap, scale)
        teacher = self._teacher(chunk)  # [positions, V]
        latents, bias = self._add_bias(logits, chunk)
        if self.matches is not None and teacher is not None:
            self._match(logits, bias, teacher, chunk)
        for part in self.parts(chunk):
            slots = chunk.slots[part]
            self.ce[slots], self.l1[slots] = self.differentiate(
                logits[part],
                bias,
                teacher,
                chunk.rows[part],
                self.operands.labels[slots, None],
                self.ce_weights[slots, None],
                self.l1_weights[slots, None],
            )
        gradient = logits  # by now
        self._add_bias_gradients(gradient, latents, bias, chunk)
        if slope is not None:
            gradient *= slope
        if scale != 1:
            gradient *= scale
        gradient = gradient.to(self.dtype)
        of_hidden, of_head, *_ = self.gradients
        if of_hidden is not None:
            of_hidden[chunk.slots] = _product(gradient, self.head)
        if of_head is not None:
            _add_product(of_head, gradient.T, states)

    def _teacher(self, chunk: _Chunk) -> Tensor | None:
        """Compute the teacher's probabilities at the chunk's positions."""
        states = self.operands.teacher_hidden
        if states is None:
            return None
        logits = _product(states[chunk.positions].to(self.dtype), self.head.T)
        _cap(logits, self.operands.softcap, self.operands.logit_scale)
        return torch.softmax(logits, -1, out=logits)

    def _add_bias(self, logits: Tensor, chunk: _Chunk) -> tuple[Tensor | None, Tensor | None]:
        """Add a bias per slot to the logits in place; return latents, and a bias per position instead."""
        if self.operands.bias is None or self.latent is None or self.bias_weight is None:
            return None, None
        if self.operands.bias.by_position:
            latents = self.latent[chunk.positions]
            return latents, _product(latents, self.bias_weight.T)
        latents = self.latent[chunk.slots]
        _add_product(logits, latents, self.bias_weight.T)
        return latents, None

    def _match(self, logits: Tensor, bias: Tensor | None, teacher: Tensor, chunk: _Chunk) -> None:
        """Note where draft and teacher have the same most likely token."""
        assert self.matches is not None
        tops = teacher.argmax(-1)
        for part in self.parts(chunk):
            scores = logits[part] if bias is None else logits[part] + bias[chunk.rows[part]]
            self.matches[chunk.slots[part]] = scores.argmax(-1) == tops[chunk.rows[part]]

    def _add_bias_gradients(
        self, gradient: Tensor, latents: Tensor | None, bias: Tensor | None, chunk: _Chunk
    ) -> None:
        """Add the gradients of the bias's latent and weight. `bias` is overwritten."""
        *_, of_latent, of_weight = self.gradients
        if of_latent is None and of_weight is None:
            return
        assert latents is not None
        of_bias = gradient if bias is None else bias.zero_().index_add_(0, chunk.rows, gradient)
        of_bias = of_bias.to(self.dtype)
        if of_weight is not None:
            _add_product(of_weight, of_bias.T, latents)
        if of_latent is not None:
            update = _product(of_bias, self.bias_weight)
            if bias is not None:
                of_latent[chunk.positions] += update
            else:
                of_latent[chunk.slots] = update


def _differentiate(
    logits: Tensor,
    bias: Tensor | None,
    teacher: Tensor | None,
    rows: Tensor,
    labels: Tensor,
    ce_weights: Tensor,
    l1_weights: Tensor,
) -> tuple[Tensor, Tensor]:
    """Turn logits into the gradients of their weighted losses, in place.

    Args:
        logits: `[C, V]`.
        bias: added to them first, a row per position, `[U, V]`; or None.
        teacher: probabilities, a row per position, `[U, V]`; or None.
        rows: the position of each row, `[C]`.
        labels: `[C, 1]`.
        ce_weights: `[C, 1]`.
        l1_weights: `[C, 1]`.

    Returns:
        Cross entropy and L1, `[C]`.
    """
    if bias is not None:
        logits += bias[rows]
    highest, of_label = logits.amax(-1, keepdim=True), logits.gather(1, labels)
    probs = logits.softmax(-1)
    # The largest probability is one over the normaliser, so no other pass is needed to find that.
    ce = (highest - probs.amax(-1, keepdim=True).log() - of_label).squeeze(1)
    if teacher is None:
        l1 = torch.zeros_like(ce)
        logits.copy_(probs).mul_(ce_weights)
    else:
        difference = probs - teacher[rows]
        l1 = difference.abs().sum(-1)
        sign = difference.sign_()
        inner = (probs * sign).sum(-1, keepdim=True)
        # p * (l1_weight * (s - <p, s>) + ce_weight)
        logits.copy_(sign.mul_(l1_weights).add_(ce_weights - l1_weights * inner)).mul_(probs)
    logits.scatter_add_(1, labels, -ce_weights)
    return ce, l1


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Return `left @ right`, at least fp32: half-precision operands are summed up in fp32 where possible."""
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left, right, out_dtype=torch.float32)
    return at_least_fp32(left @ right)


def _add_product(out: Tensor, left: Tensor, right: Tensor) -> None:
    """Compute `out += left @ right`."""
    if left.dtype == out.dtype:
        out.addmm_(left, right)
    else:
        out += _product(left, right)


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


def _spans(positions: Tensor, rows: int) -> list[tuple[int, int]]:
    """Return the first position, and the one after the last, of each `rows` ascending positions."""
    if not len(positions):
        return []
    firsts = positions[::rows]
    lasts = torch.cat([positions[rows - 1 :: rows], positions[-1:]])[: -(-len(positions) // rows)]
    return [(first, last + 1) for first, last in torch.stack([firsts, lasts], dim=1).tolist()]


def _even(total: int, most: int) -> int:
    """Return the rows of a chunk so that `total` make as few equal chunks as `most` allows."""
    chunks = max(1, -(-total // most))
    return max(1, -(-total // chunks))
