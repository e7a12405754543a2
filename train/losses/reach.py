"""The part of the target's distribution that a reduced vocabulary can reach.

Shapes: U positions, H hidden size, V the target's vocabulary, Vd the draft's, C positions of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.features import head_logits, operand_dtype
from train.losses.chunks import chunk_rows


@torch.no_grad()
def teacher_reach(
    teacher_hidden: Tensor,
    head: Tensor,
    kept: Tensor,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Compute, of each position, what the target gives to a part of its vocabulary.

    Products are in the autocast dtype, as in the pass over the vocabulary. Nothing of size [U, V] is held.

    Args:
        teacher_hidden: the target's post-norm states `[U, H]`.
        head: the target's head `[V, H]`.
        kept: the tokens of the part, each once, `[Vd]` int64.
        softcap: the target's tanh soft-cap on its logits.
        logit_scale: the target multiplies its logits by this before the soft-cap.

    Returns:
        The part's probability `[U]`, in at least fp32 and exactly 1 where the part is the whole; and whether
        the most likely token of all is in it, `[U]` bool.
    """
    head = head.to(operand_dtype(head))
    exact = torch.promote_types(head.dtype, torch.float32)
    inside = torch.zeros(len(head), dtype=torch.bool, device=head.device).index_fill_(0, kept, True)
    mass = torch.empty(len(teacher_hidden), dtype=exact, device=head.device)
    reachable = torch.empty(len(teacher_hidden), dtype=torch.bool, device=head.device)
    rows = chunk_rows(len(teacher_hidden), len(head), head.device)
    for start in range(0, len(teacher_hidden), rows):
        some = slice(start, start + rows)
        logits = head_logits(teacher_hidden[some], head, softcap, logit_scale)  # [C, V]
        highest, best = logits.max(-1, keepdim=True)
        reachable[some] = inside[best.squeeze(1)]
        shares = logits.sub_(highest).exp_()
        part = shares.index_select(1, kept).sum(-1)
        # Added up by itself: nothing outside leaves a quotient of exactly 1, which 1/sum of all would not.
        rest = shares.index_fill_(1, kept, 0).sum(-1)
        mass[some] = part / (part + rest)
    return mass, reachable
