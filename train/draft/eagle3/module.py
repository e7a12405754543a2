"""EAGLE-3 draft with its objective: a block drafter's, with a teacher that is not the draft's own head."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from train.config import RunConfig
from train.draft.blocks.attention import flex_options
from train.draft.blocks.model import DraftBlocks
from train.draft.blocks.module import BlockTrainerModule
from train.draft.eagle3.attention import resolve_attention
from train.draft.eagle3.model import Eagle3Model
from train.losses.fused import SlotOperands
from train.losses.slots import Supervised
from train.runtime.compiled import compiled


class Eagle3TrainerModule(BlockTrainerModule):
    """Unroll the draft on the target's supervision and compute its objective."""

    draft_model: Eagle3Model

    def _operands(
        self,
        blocks: DraftBlocks,
        supervised: Supervised,
        input_ids: Tensor,
        last_hidden: Tensor | None,
        known: np.ndarray | None,
    ) -> SlotOperands:
        """Select the supervised slots; arguments as in the base class.

        Raises:
            ValueError: the soft cross entropy has a weight, but there is no teacher.
        """
        if last_hidden is None and self.objective.weights.get("soft_ce", 0) > 0:
            raise ValueError(
                "the soft cross entropy needs target_last_hidden_states: pass them, or set soft_ce_alpha to 0"
            )
        operands = super()._operands(blocks, supervised, input_ids, last_hidden, known)
        model = self.draft_model
        if operands.teacher_hidden is None or not model.trains_head:
            return operands
        assert model.teacher_head is not None, "the target's head was not given"
        return dataclasses.replace(operands, teacher_head=model.teacher_head)

    def set_attention(self, config: RunConfig, device: torch.device, dtype: torch.dtype) -> None:
        """Set the attention kernel; arguments as in the base class."""
        model = self.draft_model
        model.attention = resolve_attention(config.draft.attention, model.config, device, dtype)
        if model.attention == "flex":
            model.flex_options = flex_options(model.config.head_dim, dtype, device)

    def compile_model(self, *, by_layer: bool) -> None:
        """Compile what lies between the kernels of attention: packs have many sizes.

        Args:
            by_layer: not looked at: the draft's one layer is not sharded on its own.
        """
        layer = self.draft_model.midlayer
        layer.joined, layer.residual = compiled(layer.joined), compiled(layer.residual)
