"""Block drafter with its objective."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from train.config import RunConfig
from train.data.loader import Arguments
from train.draft.blocks.attention import flex_options, resolve_attention
from train.draft.blocks.model import BlockDraftModel, DraftBlocks
from train.draft.kind import StepResult
from train.losses.fused import LowRankBias, SlotOperands, resolve_kernel, vocabulary_loss
from train.losses.reach import teacher_reach
from train.losses.slots import (
    OF_THE_VOCABULARY,
    LossSums,
    Objective,
    SlotFigures,
    Supervised,
    places,
    positive,
    sum_slots,
)
from train.runtime.compiled import compiled_for_training, compiles
from train.runtime.precision import allow_tf32, resolve_precision


@dataclass
class BlockStepMetrics:
    """Result of a forward: the loss, its sums, and the figures of each slot."""

    loss: Tensor
    sums: LossSums
    slots: SlotFigures


class BlockTrainerModule(nn.Module):
    """Run the draft on the target's supervision and compute its objective.

    Args:
        draft_model: the draft.
        objective: terms of the loss with their weights.
    """

    def __init__(self, draft_model: BlockDraftModel, objective: Objective):
        super().__init__()
        self.draft_model = draft_model
        self.objective = objective
        self.compile_loss, self.loss_kernel = False, "torch"

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
        spans: np.ndarray | None = None,
        supervised_tokens: np.ndarray | None = None,
    ) -> StepResult:
        """Draft and compute the loss; arguments as in `BlockDraftModel.draft_blocks` and `hidden_states`.

        Args:
            denominator: divisor of the loss; None takes the sum of slot weights of this forward.
            observe: record the slots where draft and target have the same most likely token; needs a teacher.
            supervised_tokens: supervised tokens of each block after its anchor, known on the host, `[B, N]`;
                from `collate_anchors`. Without it and `spans` the host waits for a GPU to count the slots.

        Raises:
            ValueError: the L1 term has a weight, but there is no teacher.
        """
        weights = self.objective.weights
        if target_last_hidden_states is None and weights.get("l1", 0) > 0:
            raise ValueError(
                "the L1 term needs target_last_hidden_states: pass them, or set the weight of the term to 0"
            )
        blocks = self.draft_model.draft_blocks(
            input_ids,
            target_hidden_states,
            loss_mask,
            anchor_positions,
            block_keep_mask,
            document_ids,
            spans,
        )
        known = None
        if spans is not None and supervised_tokens is not None:
            slots = self.draft_model.slots
            known = teacher_positions(spans, supervised_tokens, slots, input_ids.shape[1])
        supervised = Supervised.of(blocks.eval_mask, None if known is None else len(known))
        operands = self._operands(blocks, supervised, input_ids, target_last_hidden_states, known)
        matches = torch.zeros_like(operands.labels, dtype=torch.bool) if observe else None
        slot_weights = self.own_weights(operands, supervised)
        if slot_weights is not None:
            operands = dataclasses.replace(operands, **self.weighted(slot_weights))
        vocabulary = vocabulary_loss(
            operands, kernel=self.loss_kernel, compile_passes=self.compile_loss, matches=matches
        )
        slots = SlotFigures(
            supervised=supervised,
            ce=vocabulary.ce,
            l1=vocabulary.l1,
            confidence=None if blocks.confidence_pred is None else supervised.take(blocks.confidence_pred),
            matches=matches,
            anchor_positions=blocks.anchor_positions,
            soft_ce=vocabulary.soft_ce,
            mass=None if operands.teacher_mass is None else operands.teacher_mass[operands.positions],
            weights=slot_weights,
        )
        slots = dataclasses.replace(slots, **self.own_figures(blocks, operands, input_ids, slots))
        metrics = self.metrics(slots, denominator)
        assert metrics.sums is not None
        loss = vocabulary.sum
        for name, value in metrics.sums.terms.items():
            if name not in OF_THE_VOCABULARY:
                loss = loss + weights[name] * value
        total = positive(metrics.sums.weight if denominator is None else denominator)
        return dataclasses.replace(metrics, loss=loss / total)

    def metrics(self, slots: SlotFigures, denominator: Tensor | None) -> Any:
        """Return what the forward returns but for the loss, which is replaced.

        Args:
            denominator: divisor of the loss.
        """
        sums = sum_slots(slots, self.objective)
        return BlockStepMetrics(loss=sums.weight, sums=sums, slots=slots)

    def own_weights(self, operands: SlotOperands, supervised: Supervised) -> Tensor | None:
        """Return weights of the supervised slots, `[M]`, to replace the objective's decay; None keeps it."""
        return None

    def own_figures(
        self, blocks: DraftBlocks, operands: SlotOperands, input_ids: Tensor, slots: SlotFigures
    ) -> dict[str, Tensor | None]:
        """Return figures of the kind's own, as fields of `SlotFigures`; there are none here.

        Args:
            slots: the figures found so far.
        """
        return {}

    def weighted(self, slot_weights: Tensor) -> dict[str, Tensor | None]:
        """Return the weights of the terms of the vocabulary, as fields of `SlotOperands`.

        Args:
            slot_weights: weight of each supervised slot, `[M]`.
        """
        weights = self.objective.weights
        soft = weights.get("soft_ce")
        return {
            "ce_weights": weights.get("ce", 0.0) * slot_weights,
            "l1_weights": weights.get("l1", 0.0) * slot_weights,
            "soft_weights": None if soft is None else soft * slot_weights,
        }

    def reach(self, last_hidden: Tensor | None, used: Tensor) -> dict[str, Tensor]:
        """Return what a measurement needs to know of tokens outside the draft's vocabulary.

        Training does without: its teacher's probabilities are renormalised.

        Args:
            last_hidden: the teacher's states `[B, S, H]`, or None.
            used: their distinct positions in the flattened rows, `[U]`.
        """
        model = self.draft_model
        if not model.reduced or last_hidden is None or torch.is_grad_enabled():
            return {}
        states = last_hidden.flatten(0, 1)[used]
        scaled = (model.softcap, model.logit_scale)
        mass, reachable = teacher_reach(states, model.target_head, model.kept, *scaled)
        return {"teacher_mass": mass, "reachable": reachable}

    def bias(
        self, blocks: DraftBlocks, supervised: Supervised, input_ids: Tensor, used: Tensor
    ) -> LowRankBias | None:
        """Return a bias on the logits; there is none here.

        Args:
            used: distinct positions of the slots' teachers in the flattened rows, `[U]`.
        """
        return None

    def _operands(
        self,
        blocks: DraftBlocks,
        supervised: Supervised,
        input_ids: Tensor,
        last_hidden: Tensor | None,
        known: np.ndarray | None,
    ) -> SlotOperands:
        """Select the supervised slots, and each of their teachers' positions once.

        Only these meet the vocabulary. With many anchors, a position is the teacher of up to K slots.

        Args:
            known: from `teacher_positions`, where the host knows them.
        """
        model, take = self.draft_model, supervised.take
        rows = supervised.numbers // blocks.eval_mask[0].numel() * input_ids.shape[1]
        position = rows + take(blocks.teacher_positions)  # [M], in the flattened rows
        present = torch.zeros_like(input_ids, dtype=torch.bool).flatten().index_fill_(0, position, True)
        distinct = None if known is None else np.unique(known)
        used = places(present, None if distinct is None else len(distinct))  # [U]
        return SlotOperands(
            hidden=take(blocks.hidden),
            head=model.lm_head.weight,
            labels=model.draft_ids(take(blocks.target_ids)),
            **self.reach(last_hidden, used),
            positions=(present.cumsum(0) - 1).index_select(0, position),
            ordered=None if known is None else np.searchsorted(distinct, np.sort(known)),
            **self.weighted(supervised.weights(self.objective.decay_gamma)),
            teacher_hidden=None if last_hidden is None else last_hidden.flatten(0, 1)[used],
            bias=self.bias(blocks, supervised, input_ids, used),
            softcap=model.softcap,
            logit_scale=model.logit_scale,
        )

    def prepare(self, config: RunConfig, device: torch.device, *, by_layer: bool = False) -> None:
        """Set how the draft runs on a device: attention kernel, compilation, checkpointing.

        Args:
            by_layer: compile layer by layer, which sharded layers need.
        """
        model, train = self.draft_model, config.train
        allow_tf32(train.tf32)
        bf16 = resolve_precision(device, train.precision) == "bf16"
        self.set_attention(config, device, torch.bfloat16 if bf16 else torch.float32)
        model.activation_checkpointing = train.activation_checkpointing
        frozen = not model.lm_head.weight.requires_grad
        if bf16:  # the dtype of their products: saves a copy per forward
            if frozen:
                model.lm_head.to(torch.bfloat16)
            model.round_target_head()
        self.loss_kernel = resolve_kernel(config.loss.kernel, device, frozen=frozen)
        if compiles(train.compile, device):
            self.compile_loss = True
            # Under DDP, Dynamo would split graphs at gradient buckets, which flex_attention does not allow.
            torch._dynamo.config.optimize_ddp = False
            self.compile_model(by_layer=by_layer)

    def set_attention(self, config: RunConfig, device: torch.device, dtype: torch.dtype) -> None:
        """Set the attention kernel.

        Args:
            dtype: of queries, keys and values.
        """
        model = self.draft_model
        chosen, tokens = config.draft.attention, config.train.batch_tokens
        model.attention = resolve_attention(chosen, model.config, device, dtype, tokens)
        if model.attention == "flex":
            for layer in model.layers:
                layer.self_attn.flex_options = flex_options(model.config.head_dim, dtype, device)

    def compile_model(self, *, by_layer: bool) -> None:
        """Compile the draft up to the vocabulary; `by_layer` as in `prepare`."""
        model = self.draft_model
        # sdpa's groups of blocks are no part of a graph, and a checkpointed layer would not be either.
        if by_layer or model.attention == "sdpa":
            for layer in model.layers:
                layer.forward = compiled_for_training(layer.forward)
        else:
            model.backbone = compiled_for_training(model.backbone)

    @staticmethod
    def pieces(tensors: Arguments, blocks: int) -> Iterator[Arguments]:
        """Split the arguments of a forward into even parts of at most `blocks` blocks each."""
        each = ("anchor_positions", "block_keep_mask", "spans", "supervised_tokens")
        names = [name for name in each if name in tensors]
        total = tensors["anchor_positions"].shape[1]
        size = -(-total // -(-total // blocks))
        for start in range(0, total, size):
            yield {**tensors, **{name: tensors[name][:, start : start + size] for name in names}}


def teacher_positions(
    spans: np.ndarray, supervised_tokens: np.ndarray, num_slots: int, seq_len: int
) -> np.ndarray:
    """Return the position of each supervised slot's teacher, in the order of the slots.

    Args:
        spans: from `masks.context_spans`, `[B, N, 2]`.
        supervised_tokens: supervised tokens of each block after its anchor, `[B, N]`.
        num_slots: K.
        seq_len: S.

    Returns:
        Positions in the flattened rows, `[M]`; a teacher is at the position before its label.
    """
    slots = np.arange(num_slots)
    rows = np.arange(len(spans))[:, None, None] * seq_len
    positions = rows + spans[..., 1:] + slots  # [B, N, K]
    return positions[slots < supervised_tokens[..., None]]
