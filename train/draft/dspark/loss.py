"""DSpark loss and figures of one forward (NeMo-Automodel's documented dspark API)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from train.draft.dspark.model import DSparkForwardOutput
from train.losses.slots import LossSums, Objective, SlotFigures, Supervised, divide, slot_losses, sum_slots


@dataclass
class DSparkStepMetrics:
    """Loss of a forward, its three terms, and the acceptance by the target."""

    loss: Tensor
    ce_loss: Tensor
    l1_loss: Tensor
    confidence_loss: Tensor
    accept_rate: Tensor | None = None
    """Mean acceptance over supervised slots."""
    tau: Tensor | None = None
    """Expected tokens per round: 1 + the mean of `LossSums.prefix`."""
    accept_by_position: Tensor | None = None
    """Mean acceptance of each slot `[K]`, given the true tokens before its label."""
    sums: LossSums | None = None
    """Numerators and denominators of the figures above."""
    slots: SlotFigures | None = None
    """Figures of each slot."""


def step_metrics(
    slots: SlotFigures, objective: Objective, denominator: Tensor | None = None
) -> DSparkStepMetrics:
    """Sum the figures of a forward's slots and divide.

    Args:
        denominator: as in `divide`.
    """
    sums = sum_slots(slots, objective)
    metrics = divide(sums, objective, denominator)
    zero = metrics.loss.new_zeros(())
    own = {f"{name}_loss": metrics.terms.get(name, zero) for name in ("ce", "l1", "confidence")}
    return DSparkStepMetrics(
        loss=metrics.loss,
        **own,
        accept_rate=metrics.accept_rate,
        tau=metrics.tau,
        accept_by_position=metrics.accept_by_position,
        sums=sums,
        slots=slots,
    )


def compute_dspark_loss(
    outputs: DSparkForwardOutput,
    loss_decay_gamma: float | None = None,
    ce_loss_alpha: float = 0.1,
    l1_loss_alpha: float = 0.9,
    confidence_head_alpha: float = 1.0,
) -> DSparkStepMetrics:
    """Compute ce_alpha * CE + l1_alpha * L1 + confidence_alpha * BCE of one forward.

    Args:
        outputs: returned by `Qwen3DSparkModel.forward`.
        loss_decay_gamma: slot k has weight exp(-k / gamma); None gives all slots the same weight.
        ce_loss_alpha: weight of the cross entropy with the data's token.
        l1_loss_alpha: weight of the L1 distance to the target's distribution.
        confidence_head_alpha: weight of the confidence head's binary cross entropy.
    """
    supervised = Supervised.of(outputs.eval_mask)
    teacher, confidence = outputs.aligned_target_logits, outputs.confidence_pred
    losses = slot_losses(
        supervised.take(outputs.draft_logits),
        supervised.take(outputs.target_ids),
        None if teacher is None else supervised.take(teacher),
    )
    confidence = None if confidence is None else supervised.take(confidence)
    slots = SlotFigures(supervised, losses.ce, losses.l1, confidence)
    weights = {"ce": ce_loss_alpha, "l1": l1_loss_alpha, "confidence": confidence_head_alpha}
    return step_metrics(slots, Objective(weights, loss_decay_gamma))
