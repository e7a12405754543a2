"""Draft model: maps the context to K drafted tokens per anchor.

Public names follow NVIDIA NeMo-Automodel's documented API (draft_qwen3.Qwen3DSparkModel,
dspark.common.DSparkForwardOutput); parameter names are those that vLLM and SGLang load.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Qwen3Config

from pipeline.features import head_logits
from train.draft.blocks.model import BlockDraftModel
from train.draft.dspark.confidence import AcceptRatePredictor
from train.draft.dspark.markov import MARKOV_HEADS
from train.draft.vocabulary import draft_vocab_size


@dataclass
class DSparkForwardOutput:
    """Outputs of one DSpark training forward. B rows, N anchors, K slots, V vocabulary.

    The slots with `eval_mask` set are supervised: an unbroken prefix of each kept block. Dummy blocks stand
    in for missing anchors; both masks are False for them.
    """

    draft_logits: Tensor
    """`[B, N, K, V]` fp32, Markov bias included."""
    target_ids: Tensor
    """Labels `[B, N, K]`; meaningless where `eval_mask` is False."""
    eval_mask: Tensor
    """`[B, N, K]` bool."""
    block_keep_mask: Tensor
    """`[B, N]` bool."""
    confidence_pred: Tensor | None = None
    """Confidence logits `[B, N, K]`."""
    aligned_target_logits: Tensor | None = None
    """The teacher's logits for the same labels, `[B, N, K, V]` fp32, detached."""


class Qwen3DSparkModel(BlockDraftModel):
    """A DSpark draft with Qwen3's body, for a target of any family.

    Args:
        config: a `Qwen3Config` (or an object with its fields) that also has `block_size`,
            `mask_token_id`, `target_layer_ids`, `num_target_layers`, `num_anchors`, `markov_rank`,
            `markov_head_type`, `enable_confidence_head`, `confidence_head_with_markov`, and if the
            target has them `embedding_scale`, `logit_scale` and `final_logit_softcapping`.
    """

    _no_split_modules = ("BlockDecoderLayer",)

    def __init__(self, config: Qwen3Config):
        super().__init__(config)
        hidden = config.hidden_size
        if config.markov_rank > 0:
            head = MARKOV_HEADS[config.markov_head_type]
            self.markov_head = head(config.vocab_size, hidden, config.markov_rank, draft_vocab_size(config))
        if config.enable_confidence_head:
            extra = config.markov_rank if config.confidence_head_with_markov else 0
            self.confidence_head = AcceptRatePredictor(hidden + extra)
        self.post_init()

    @property
    def sees_tokens(self) -> bool:
        return self.markov_head is not None and self.markov_head.fresh_gate is not None

    def begin_bias(self, of_tokens: Tensor, mean: Tensor, covariance: Tensor, root: Tensor) -> None:
        if self.sees_tokens:
            scaled = of_tokens * self.logit_scale
            embedding, head = self.embed_tokens.weight, self.lm_head.weight
            self.markov_head.begin(embedding, mean, head, scaled, covariance, root)

    def heads(self, hidden: Tensor, previous: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Apply the Markov head and the confidence head; arguments and results as in the base class."""
        embedded = latent = confidence = None
        if self.markov_head is not None:
            embedded = self.markov_head.markov_w1(previous)  # [B, N, K, R]
            latent = self.markov_head.latent(embedded, hidden)
        if self.confidence_head is not None:
            with_markov = self.config.confidence_head_with_markov
            confidence = self.confidence_head(torch.cat([hidden, embedded], -1) if with_markov else hidden)
        return latent, confidence

    def forward(
        self,
        input_ids: Tensor,
        target_hidden_states: Tensor,
        loss_mask: Tensor,
        target_last_hidden_states: Tensor | None = None,
        anchor_positions: Tensor | None = None,
        block_keep_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
    ) -> DSparkForwardOutput:
        """Draft a block at every anchor, teacher-forced.

        Args:
            input_ids: `[B, S]`, padded on the right.
            target_hidden_states: context features `[B, S, L*H]`, or `[B, S, L, H]` of any strides.
            loss_mask: `[B, S]`, 0 on padding.
            target_last_hidden_states: the teacher's post-norm states `[B, S, H]`, or None for no teacher.
            anchor_positions: `[B, N]`; None draws `config.num_anchors` per row.
            block_keep_mask: `[B, N]` bool; required with `anchor_positions`.
            document_ids: `[B, S]`, the document of each position, if a row holds several; each document is
                contiguous. Position ids restart at each document, and no block sees another document.

        Raises:
            ValueError: as in `draft_blocks`.
        """
        blocks = self.draft_blocks(
            input_ids, target_hidden_states, loss_mask, anchor_positions, block_keep_mask, document_ids
        )
        teacher = None
        if target_last_hidden_states is not None:
            rows = torch.arange(len(input_ids), device=input_ids.device)[:, None, None]
            with torch.no_grad():
                states = target_last_hidden_states[rows, blocks.teacher_positions]  # [B, N, K, H]
                teacher = head_logits(states, self.lm_head.weight, self.softcap, self.logit_scale)
        return DSparkForwardOutput(
            draft_logits=self.draft_logits(blocks.hidden, blocks.latent),
            target_ids=blocks.target_ids,
            eval_mask=blocks.eval_mask,
            block_keep_mask=blocks.block_keep_mask,
            confidence_pred=blocks.confidence_pred,
            aligned_target_logits=teacher,
        )
