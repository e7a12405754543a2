"""Draft with its objective (NeMo-Automodel's documented dspark.core API)."""

from __future__ import annotations

from torch import Tensor

from train.draft.blocks.model import DraftBlocks
from train.draft.blocks.module import BlockTrainerModule
from train.draft.dspark.loss import DSparkStepMetrics, step_metrics
from train.draft.dspark.model import Qwen3DSparkModel
from train.losses.fused import LowRankBias
from train.losses.slots import Objective, SlotFigures, Supervised

__all__ = ["DSparkStepMetrics", "DSparkTrainerModule"]


class DSparkTrainerModule(BlockTrainerModule):
    """Run the draft on the target's supervision and compute its objective.

    Args:
        draft_model: the draft.
        loss_decay_gamma: slot k has weight exp(-k / gamma); None gives all slots the same weight.
        ce_loss_alpha: weight of the cross entropy with the data's token.
        l1_loss_alpha: weight of the L1 distance to the target's distribution.
        confidence_head_alpha: weight of the confidence head's binary cross entropy.
        objective: replaces the four arguments above, and may weigh further terms.
    """

    def __init__(
        self,
        draft_model: Qwen3DSparkModel,
        loss_decay_gamma: float | None = None,
        ce_loss_alpha: float = 0.1,
        l1_loss_alpha: float = 0.9,
        confidence_head_alpha: float = 1.0,
        objective: Objective | None = None,
    ):
        weights = {"ce": ce_loss_alpha, "l1": l1_loss_alpha, "confidence": confidence_head_alpha}
        super().__init__(draft_model, objective or Objective(weights, loss_decay_gamma))

    def metrics(self, slots: SlotFigures, denominator: Tensor | None) -> DSparkStepMetrics:
        return step_metrics(slots, self.objective, denominator)

    def bias(
        self, blocks: DraftBlocks, supervised: Supervised, input_ids: Tensor, used: Tensor
    ) -> LowRankBias | None:
        """Return the Markov head's bias; arguments as in the base class."""
        head = self.draft_model.markov_head
        if head is None:
            return None
        # The token before a label is at its teacher's position.
        by_position = head.by_position
        latent = head.markov_w1(input_ids.flatten()[used]) if by_position else supervised.take(blocks.latent)
        return LowRankBias(latent=latent, weight=head.markov_w2.weight, by_position=by_position)
