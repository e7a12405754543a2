"""The three-term loss, written to be read: this is the definition.

DSpark paper, section 3.3. B rows, N anchors, K slots, V vocabulary. Slot k weighs
w_k = exp(-k / gamma), and counts where it is supervised. Every term is sum(w * term) / sum(w); here are
the sums, and the division happens once, after everything that belongs together was added up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.features import at_least_fp32
from train.draft.dspark.model import DSparkForwardOutput


@dataclass
class LossSums:
    """Sums over supervised slots; add those of micro-batches or ranks, then divide."""

    weight: Tensor
    """sum of w."""
    ce: Tensor
    """sum of w * cross entropy with the data's token."""
    l1: Tensor
    """sum of w * sum_v |p_draft - p_target|, not halved."""
    confidence: Tensor
    """sum of w * binary cross entropy of the confidence logit with the acceptance."""
    accepted: Tensor
    """sum of the acceptance a = 1 - L1/2, by slot `[K]`."""
    slots: Tensor
    """number of supervised slots, by slot `[K]`."""
    prefix: Tensor
    """sum over blocks of sum_k prod_{j<=k} a_j: drafted tokens expected to be accepted."""
    blocks: Tensor
    """number of blocks with a supervised slot."""

    def __iter__(self) -> Iterator[Tensor]:
        return (getattr(self, field.name) for field in fields(self))

    def __add__(self, other: LossSums) -> LossSums:
        return LossSums(*(a + b for a, b in zip(self, other, strict=True)))

    def detach(self) -> LossSums:
        """The same sums without their graph."""
        return LossSums(*(value.detach() for value in self))


@dataclass
class SlotFigures:
    """What became of each of the M supervised slots, in the order of the mask that says which they are."""

    eval_mask: Tensor
    """`[B, N, K]` bool."""
    ce: Tensor
    """Cross entropy with the data's token, `[M]`."""
    l1: Tensor
    """sum_v |p_draft - p_target|, `[M]`."""
    matches: Tensor
    """Whether draft and target have the same most likely token, `[M]` bool."""
    confidence: Tensor | None
    """Confidence logits `[M]`."""


@dataclass
class DSparkStepMetrics:
    """A step's loss, its three terms, and how much the target would accept."""

    loss: Tensor
    ce_loss: Tensor
    l1_loss: Tensor
    confidence_loss: Tensor
    accept_rate: Tensor | None = None
    """Mean acceptance over supervised slots."""
    tau: Tensor | None = None
    """Expected tokens a round: 1 + the mean of `LossSums.prefix`."""
    accept_by_position: Tensor | None = None
    """Mean acceptance of each slot `[K]`, given its label's own prefix."""
    sums: LossSums | None = None
    """What the figures above were divided from."""
    slots: SlotFigures | None = None
    """Each slot's own, where they were asked for."""


def slot_weights(block_size: int, gamma: float | None, device: torch.device | None = None) -> Tensor:
    """w_k = exp(-k / gamma), k from 0: `[K]` fp32; all ones when gamma is None."""
    slots = torch.arange(block_size, dtype=torch.float32, device=device)
    return torch.ones_like(slots) if gamma is None else torch.exp(-slots / gamma)


def slot_losses(logits: Tensor, labels: Tensor, teacher: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Each slot's cross entropy and L1, `[M]`, from logits `[M, V]` of draft and teacher."""
    log_probs = at_least_fp32(logits).log_softmax(-1)
    ce = F.nll_loss(log_probs, labels, reduction="none")
    if teacher is None:
        return ce, None
    return ce, (log_probs.exp() - at_least_fp32(teacher.detach()).softmax(-1)).abs().sum(-1)


def sum_slots(
    eval_mask: Tensor, ce: Tensor, l1: Tensor | None, confidence: Tensor | None, gamma: float | None
) -> LossSums:
    """The sums over the M supervised slots of `eval_mask`.

    Args:
        eval_mask: `[B, N, K]` bool.
        ce: cross entropy of each supervised slot `[M]`, in the mask's order.
        l1: likewise; None leaves L1, confidence and acceptance zero.
        confidence: confidence logits `[M]`; None leaves that term zero.
        gamma: slot k weighs exp(-k / gamma); None weighs all alike.
    """
    weights = slot_weights(eval_mask.shape[-1], gamma, eval_mask.device).expand(eval_mask.shape)[eval_mask]
    l1_sum = confidence_sum = ce.new_zeros(())
    accept = ce.new_zeros(eval_mask.shape)  # [B, N, K]
    if l1 is not None:
        l1_sum = (weights * l1).sum()
        reached = (1 - l1.detach() / 2).clamp(0, 1)
        accept[eval_mask] = reached
        if confidence is not None:
            bce = F.binary_cross_entropy_with_logits(at_least_fp32(confidence), reached, reduction="none")
            confidence_sum = (weights * bce).sum()
    return LossSums(
        weight=weights.sum(),
        ce=(weights * ce).sum(),
        l1=l1_sum,
        confidence=confidence_sum,
        accepted=accept.detach().sum(dim=(0, 1)),
        slots=eval_mask.sum(dim=(0, 1)),
        prefix=accept.detach().cumprod(dim=-1).sum(),  # zero behind the supervised prefix
        blocks=eval_mask[..., 0].sum(),
    )


def positive(weight: Tensor) -> Tensor:
    """A denominator that an empty batch can't make zero: its loss is 0, not NaN."""
    return weight.clamp(min=torch.finfo(torch.float32).tiny)


def divide(
    sums: LossSums,
    ce_loss_alpha: float,
    l1_loss_alpha: float,
    confidence_head_alpha: float,
    denominator: Tensor | None = None,
) -> DSparkStepMetrics:
    """Turn sums into the loss and the figures beside it.

    Args:
        denominator: the sum of weights over the whole optimiser step (all micro-batches, all ranks)
            when `sums` is only a part of it.
    """
    total = positive(sums.weight if denominator is None else denominator)
    ce, l1, confidence = sums.ce / total, sums.l1 / total, sums.confidence / total
    return DSparkStepMetrics(
        loss=ce_loss_alpha * ce + l1_loss_alpha * l1 + confidence_head_alpha * confidence,
        ce_loss=ce,
        l1_loss=l1,
        confidence_loss=confidence,
        accept_rate=sums.accepted.sum() / sums.slots.sum().clamp(min=1),
        tau=1 + sums.prefix / sums.blocks.clamp(min=1),
        accept_by_position=sums.accepted / sums.slots.clamp(min=1),
        sums=sums,
    )


def compute_dspark_loss(
    outputs: DSparkForwardOutput,
    loss_decay_gamma: float | None = None,
    ce_loss_alpha: float = 0.1,
    l1_loss_alpha: float = 0.9,
    confidence_head_alpha: float = 1.0,
) -> DSparkStepMetrics:
    """The DSpark loss of one forward: ce_alpha * CE + l1_alpha * L1 + confidence_alpha * BCE.

    Args:
        outputs: of `Qwen3DSparkModel.forward`.
        loss_decay_gamma: slot k weighs exp(-k / gamma); None weighs all alike.
        ce_loss_alpha: weight of the cross entropy with the data's token.
        l1_loss_alpha: weight of the L1 distance to the target's distribution.
        confidence_head_alpha: weight of the confidence head's binary cross entropy.
    """
    mask = outputs.eval_mask
    teacher, confidence = outputs.aligned_target_logits, outputs.confidence_pred
    ce, l1 = slot_losses(
        outputs.draft_logits[mask], outputs.target_ids[mask], None if teacher is None else teacher[mask]
    )
    sums = sum_slots(mask, ce, l1, None if confidence is None else confidence[mask], loss_decay_gamma)
    return divide(sums, ce_loss_alpha, l1_loss_alpha, confidence_head_alpha)
