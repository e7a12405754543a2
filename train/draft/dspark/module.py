"""The draft together with its objective (NeMo-Automodel's documented dspark.core API)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from train.draft.dspark.model import Qwen3DSparkModel
from train.losses.fused import vocabulary_loss
from train.losses.slots import DSparkStepMetrics, SlotFigures, divide, positive, slot_weights, sum_slots

__all__ = ["DSparkStepMetrics", "DSparkTrainerModule"]


class DSparkTrainerModule(nn.Module):
    """Run the draft on the target's supervision and compute the three-term objective.

    Args:
        draft_model: the draft.
        loss_decay_gamma: slot k weighs exp(-k / gamma); None weighs all alike.
        ce_loss_alpha: weight of the cross entropy with the data's token.
        l1_loss_alpha: weight of the L1 distance to the target's distribution.
        confidence_head_alpha: weight of the confidence head's binary cross entropy.
    """

    def __init__(
        self,
        draft_model: Qwen3DSparkModel,
        loss_decay_gamma: float | None = None,
        ce_loss_alpha: float = 0.1,
        l1_loss_alpha: float = 0.9,
        confidence_head_alpha: float = 1.0,
    ):
        super().__init__()
        self.draft_model = draft_model
        self.loss_decay_gamma = loss_decay_gamma
        self.ce_loss_alpha = ce_loss_alpha
        self.l1_loss_alpha = l1_loss_alpha
        self.confidence_head_alpha = confidence_head_alpha
        self.compile_loss = False

    def forward(
        self,
        input_ids: Tensor,
        target_hidden_states: Tensor,
        loss_mask: Tensor,
        target_last_hidden_states: Tensor | None = None,
        anchor_positions: Tensor | None = None,
        block_keep_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        denominator: Tensor | None = None,
        observe: bool = False,
    ) -> DSparkStepMetrics:
        """Draft and compute the loss; arguments as in `Qwen3DSparkModel.forward`.

        Args:
            denominator: sum of slot weights over the whole optimiser step, when this is a part of it.
            observe: whether to return each slot's figures too; needs a teacher.

        Raises:
            ValueError: the L1 term is asked for and there is no teacher to take it from.
        """
        if target_last_hidden_states is None and self.l1_loss_alpha > 0:
            raise ValueError(
                "l1_loss_alpha > 0 needs target_last_hidden_states: pass the teacher's states, or set it to 0"
            )
        model = self.draft_model
        blocks = model.draft_blocks(
            input_ids, target_hidden_states, loss_mask, anchor_positions, block_keep_mask, document_ids
        )
        mask = blocks.eval_mask
        # Only supervised slots meet the vocabulary: dummies and tails behind a sample's end do not.
        weights = slot_weights(model.block_size, self.loss_decay_gamma, mask.device).expand(mask.shape)[mask]
        # With many anchors a position is the teacher of up to K slots: keep each once.
        rows = mask.nonzero()[:, 0] * input_ids.shape[1]
        used, which = torch.unique(rows + blocks.teacher_positions[mask], return_inverse=True)
        teacher_hidden = None
        if target_last_hidden_states is not None:
            teacher_hidden = target_last_hidden_states.flatten(0, 1)[used]
        latent, by_position = None, False
        if model.markov_head is not None:
            by_position = model.markov_head.by_position
            # The token before a label is the one at its teacher's position.
            before = input_ids.flatten()[used]
            latent = model.markov_head.markov_w1(before) if by_position else blocks.latent[mask]
        matches = torch.zeros(len(which), dtype=torch.bool, device=which.device) if observe else None
        objective, ce, l1 = vocabulary_loss(
            blocks.hidden[mask],
            latent,
            model.lm_head.weight,
            None if model.markov_head is None else model.markov_head.markov_w2.weight,
            blocks.target_ids[mask],
            teacher_hidden,
            which,
            self.ce_loss_alpha * weights,
            self.l1_loss_alpha * weights,
            model.softcap,
            model.logit_scale,
            latent_by_position=by_position,
            compile_passes=self.compile_loss,
            matches=matches,
        )
        confidence = None if blocks.confidence_pred is None else blocks.confidence_pred[mask]
        sums = sum_slots(mask, ce, None if teacher_hidden is None else l1, confidence, self.loss_decay_gamma)
        terms = (self.ce_loss_alpha, self.l1_loss_alpha, self.confidence_head_alpha)
        metrics = divide(sums, *terms, denominator)
        total = positive(sums.weight if denominator is None else denominator)
        loss = (objective + self.confidence_head_alpha * sums.confidence) / total
        slots = None if matches is None else SlotFigures(mask, ce, l1, matches, confidence)
        return dataclasses.replace(metrics, loss=loss, slots=slots)
