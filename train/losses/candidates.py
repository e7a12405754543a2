"""The most likely tokens of each slot, chunk by chunk: nothing of size [M, V] is ever held.

Shapes: M supervised slots, C candidates of each, H hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.features import head_logits, operand_dtype
from train.losses.chunks import chunk_rows, chunks_of
from train.losses.operands import SlotOperands


@dataclass(frozen=True)
class Candidates:
    """Candidates of M slots, the most likely first."""

    ids: Tensor
    """Token ids, `[M, C]`."""
    logits: Tensor
    """The draft's logits of them, `[M, C]`, at least fp32; these carry a gradient."""
    teacher: Tensor | None
    """The target's probabilities of them, `[M, C]`; None without a teacher."""
    teacher_best: Tensor | None
    """The target's most likely token of all, `[M]`; None without a teacher."""


def top_candidates(operands: SlotOperands, count: int) -> Candidates:
    """Return the `count` most likely tokens of each slot by the draft's logits, which have no bias.

    Products are in the autocast dtype, as in the pass over the vocabulary.
    """
    assert operands.bias is None
    hidden, head = operands.hidden, operands.head
    dtype = operand_dtype(head)
    with torch.autocast(hidden.device.type, enabled=False):
        return Candidates(*_Candidates.apply(hidden, head, operands, count, dtype))


class _Candidates(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, head: Tensor, operands: SlotOperands, count: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        scaled = (operands.softcap, operands.logit_scale)
        exact = torch.promote_types(dtype, torch.float32)
        rounded = head.to(dtype)
        ids = operands.positions.new_empty(len(hidden), count)
        logits = torch.empty(ids.shape, dtype=exact, device=ids.device)
        teacher = best = None
        if operands.teacher_hidden is not None:
            teacher, best = torch.empty_like(logits), torch.empty_like(operands.positions)
        for chunk in chunks_of(operands):
            drafted = head_logits(hidden[chunk.slots], rounded, *scaled)  # [rows of the chunk, V]
            logits[chunk.slots], ids[chunk.slots] = drafted.topk(count)
            if operands.teacher_hidden is None:
                continue
            taught = head_logits(operands.teacher_hidden[chunk.positions], rounded, *scaled).softmax(-1)
            teacher[chunk.slots] = taught[chunk.rows[:, None], ids[chunk.slots]]
            best[chunk.slots] = taught.argmax(-1)[chunk.rows]
        ctx.save_for_backward(hidden, head, ids, logits)
        ctx.scaled, ctx.dtype = scaled, dtype
        ctx.mark_non_differentiable(*(each for each in (ids, teacher, best) if each is not None))
        return ids, logits, teacher, best

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _ids: None, gradient: Tensor, *_others: None) -> tuple[Tensor | None, ...]:
        hidden, head, ids, logits = ctx.saved_tensors
        softcap, scale = ctx.scaled
        gradient = gradient * scale if softcap is None else gradient * (1 - (logits / softcap) ** 2) * scale
        of_hidden, of_head = torch.empty_like(hidden), None
        if ctx.needs_input_grad[1]:
            of_head = torch.zeros(head.shape, dtype=gradient.dtype, device=head.device)
        rows = chunk_rows(len(ids), ids.shape[1] * head.shape[1], head.device)
        for start in range(0, len(ids), rows):
            some = slice(start, start + rows)
            weights = head[ids[some]].to(ctx.dtype).to(gradient.dtype)  # [rows, C, H]
            of_hidden[some] = torch.einsum("mc,mch->mh", gradient[some], weights).to(hidden.dtype)
            if of_head is not None:
                states = hidden[some].to(ctx.dtype).to(gradient.dtype)
                outer = gradient[some, :, None] * states[:, None]  # [rows, C, H]
                of_head.index_add_(0, ids[some].flatten(), outer.flatten(0, 1))
        return of_hidden, None if of_head is None else of_head.to(head.dtype), None, None, None
