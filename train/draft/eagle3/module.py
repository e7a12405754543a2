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
from train.losses.fused import SlotOperands, resolve_kernel
from train.losses.slots import Supervised
from train.runtime.compiled import compiled, compiles
from train.runtime.precision import allow_tf32, resolve_precision


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

    def prepare(self, config: RunConfig, device: torch.device, *, by_layer: bool = False) -> None:
        """Set how the draft runs on a device: attention kernel, compilation, checkpointing.

        Args:
            by_layer: not looked at: the draft's one layer is not sharded on its own.
        """
        model, train = self.draft_model, config.train
        allow_tf32(train.tf32)
        bf16 = resolve_precision(device, train.precision) == "bf16"
        dtype = torch.bfloat16 if bf16 else torch.float32
        model.attention = resolve_attention(config.draft.attention, model.config, device, dtype)
        if model.attention == "flex":
            model.flex_options = flex_options(model.config.head_dim, dtype, device)
        model.activation_checkpointing = train.activation_checkpointing
        frozen = not model.lm_head.weight.requires_grad
        if bf16:  # the dtype of their products: saves a copy per forward
            if frozen:
                model.lm_head.to(torch.bfloat16)
            model.round_target_head()
        self.loss_kernel = resolve_kernel(config.loss.kernel, device, frozen=frozen)
        if compiles(train.compile, device):
            self.compile_loss = True
            torch._dynamo.config.optimize_ddp = False  # a graph is smaller than a bucket of gradients
            layer = model.midlayer  # what lies between the kernels of attention; packs have many sizes
            layer.joined, layer.residual = compiled(layer.joined), compiled(layer.residual)
