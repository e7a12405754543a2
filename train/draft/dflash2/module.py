"""DFlash2 draft with its objective: DFlash's, and the choice among a slot's candidates."""

from __future__ import annotations

import torch
from torch import Tensor

from train.draft.blocks.model import DraftBlocks
from train.draft.dflash.module import DFlashTrainerModule
from train.losses.candidates import top_candidates
from train.losses.fused import SlotOperands
from train.losses.slots import SlotFigures


class DFlash2TrainerModule(DFlashTrainerModule):
    """Run the draft on the target's supervision and compute its objective; arguments as in the base class.

    The selector chooses after the true predecessor, as it does while decoding if that was accepted.
    Acceptance is that of its choice: candidates are drafted with its probabilities, other tokens never.
    """

    def own_figures(
        self, blocks: DraftBlocks, operands: SlotOperands, input_ids: Tensor, slots: SlotFigures
    ) -> dict[str, Tensor | None]:
        """Return the figures of the selector's choice; arguments as in the base class."""
        selector = self.draft_model.candidate_selector
        tokens = input_ids.long().gather(1, blocks.teacher_positions.flatten(1))
        previous = slots.supervised.take(tokens.view_as(blocks.teacher_positions))  # [M]
        found = top_candidates(operands, selector.top_k)
        scores = found.logits + selector(operands.hidden, previous, found.ids)  # [M, C]
        log_probs = scores.log_softmax(-1)
        is_label = found.ids == operands.labels[:, None]
        figures: dict[str, Tensor | None] = {
            "selector": -(log_probs * is_label).sum(-1),
            "missed": 1 - is_label.any(-1).to(log_probs.dtype),
        }
        if found.teacher is not None:
            figures["accepted"] = torch.minimum(log_probs.detach().exp(), found.teacher).sum(-1)
            if slots.matches is not None:
                choice = found.ids.gather(1, scores.argmax(-1, keepdim=True)).squeeze(1)
                figures["matches"] = choice == found.teacher_best
        return figures
