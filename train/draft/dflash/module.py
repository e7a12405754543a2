"""DFlash draft with its objective, optionally weighted by D-PACE."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from train.draft.blocks.module import BlockTrainerModule
from train.draft.dflash.model import Qwen3DFlashModel
from train.losses.fused import SlotOperands, vocabulary_loss
from train.losses.slots import Objective, Supervised


class DFlashTrainerModule(BlockTrainerModule):
    """Run the draft on the target's supervision and compute its objective.

    Args:
        draft_model: the draft.
        objective: terms of the loss with their weights.
        dpace_smoothing: weigh slots by D-PACE with this share of 1 in each confidence; None weighs them by
            the objective's decay.
    """

    def __init__(
        self, draft_model: Qwen3DFlashModel, objective: Objective, dpace_smoothing: float | None = None
    ):
        super().__init__(draft_model, objective)
        self.dpace_smoothing = dpace_smoothing

    def own_weights(self, operands: SlotOperands, supervised: Supervised) -> Tensor | None:
        """Return D-PACE's weight of each supervised slot, `[M]`. It costs a forward of the head.

        A measurement, without gradients, weighs all slots alike: weights that follow the draft would make its
        losses of two checkpoints incomparable.
        """
        if self.dpace_smoothing is None or not torch.is_grad_enabled():
            return None
        with torch.no_grad():
            alone = dataclasses.replace(operands, teacher_hidden=None, soft_weights=None)
            ce = vocabulary_loss(alone, kernel=self.loss_kernel, compile_passes=self.compile_loss).ce
        inside = operands.labels >= 0  # other labels are never drafted, and have no cross entropy
        confidences = supervised.lay_out(torch.exp(-ce) * inside)
        return supervised.take(dpace_weights(confidences, supervised.mask, self.dpace_smoothing))


def dpace_weights(confidences: Tensor, mask: Tensor, smoothing: float) -> Tensor:
    """Return the weights of slots by D-PACE (arXiv 2605.18810): a slot weighs what is drafted from it on.

    With s_i = (1 - smoothing) c_i + smoothing, slot k weighs sum_{j >= k} prod_{i <= j} s_i, over the
    supervised slots j: the terms of the expected accepted length that contain slot k.

    The loss divides by the number of blocks of an optimiser step. Their sum would cancel what the weights
    say: how much is accepted.

    Args:
        confidences: the draft's probability of each slot's label, `[B, N, K]`.
        mask: supervised slots, `[B, N, K]` bool: a prefix of each block.
        smoothing: share of 1 in each confidence.

    Returns:
        `[B, N, K]`, zero at the other slots.
    """
    smooth = (1 - smoothing) * confidences + smoothing
    reached = smooth.cumprod(-1) * mask
    return reached.flip(-1).cumsum(-1).flip(-1) * mask
