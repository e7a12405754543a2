"""Body of block drafters: maps the context to the states of a block per anchor.

Parameter names are those that vLLM and SGLang load.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from pipeline.features import head_logits
from train.draft.blocks.anchors import (
    build_eval_mask,
    create_noise_embed,
    create_position_ids,
    label_positions,
    restarting_positions,
    sample_anchor_positions,
)
from train.draft.blocks.attention import BlockRotaryEmbedding
from train.draft.blocks.layers import BlockDecoderLayer
from train.draft.blocks.masks import Mask, flex_block_mask, layer_windows, sdpa_mask
from train.draft.vocabulary import ReducedVocabulary, draft_vocab_size


@dataclass
class DraftBlocks:
    """Blocks of a training forward, before any tensor of the vocabulary's size is made."""

    hidden: Tensor
    """`[B, N, K, H]`, after the final norm."""
    latent: Tensor | None
    """Input of the Markov head's W2, `[B, N, K, R]`; None without a Markov head."""
    target_ids: Tensor
    """Labels `[B, N, K]`."""
    teacher_positions: Tensor
    """Position of each label's teacher, `[B, N, K]`: the position before the label."""
    eval_mask: Tensor
    """`[B, N, K]` bool."""
    block_keep_mask: Tensor
    """`[B, N]` bool."""
    anchor_positions: Tensor
    """`[B, N]`."""
    confidence_pred: Tensor | None
    """Confidence logits `[B, N, K]`."""


def check_features(model: PreTrainedModel, features: Tensor) -> None:
    """Check that context features `[B, S, ..]` fit a draft's layers. Raise ValueError if not."""
    width = features.shape[2:].numel()
    if width != model.fc.in_features:
        raise ValueError(
            f"expected context features of width {model.fc.in_features} "
            f"({len(model.config.target_layer_ids)} layers), got {width}"
        )


class BlockDraftModel(PreTrainedModel, ReducedVocabulary):
    """A block drafter with Qwen3's body, for a target of any family. Subclasses call `post_init`.

    Args:
        config: a `Qwen3Config` (or an object with its fields) that also has `block_size`,
            `mask_token_id`, `target_layer_ids`, `num_anchors`, and if the target has them
            `embedding_scale`, `logit_scale` and `final_logit_softcapping`.
    """

    config_class = Qwen3Config
    base_model_prefix = ""
    _no_split_modules = ("BlockDecoderLayer",)
    _supports_sdpa = True
    _tied_weights_keys = None
    layer_class: type[BlockDecoderLayer] = BlockDecoderLayer
    first_slot = 0
    """First row of a block that drafts: row r drafts the token at anchor + r + 1 - first_slot."""

    def __init__(self, config: Qwen3Config):
        super().__init__(config)
        hidden = config.hidden_size
        self.block_size = config.block_size
        self.embedding_scale = getattr(config, "embedding_scale", None) or 1.0
        self.logit_scale = getattr(config, "logit_scale", None) or 1.0
        self.softcap = getattr(config, "final_logit_softcapping", None)
        # Not in the config: these two change how the draft runs, not what it computes.
        self.attention: Literal["sdpa", "flex"] = "sdpa"
        self.activation_checkpointing = False
        self.embed_tokens = nn.Embedding(config.vocab_size, hidden)
        self.fc = nn.Linear(len(config.target_layer_ids) * hidden, hidden, bias=False)
        self.hidden_norm = Qwen3RMSNorm(hidden, eps=config.rms_norm_eps)
        self.windows = layer_windows(config)
        self.layers = nn.ModuleList(self.layer_class(config, window) for window in self.windows)
        self.norm = Qwen3RMSNorm(hidden, eps=config.rms_norm_eps)
        self.rotary_emb = BlockRotaryEmbedding(config)
        self.lm_head = nn.Linear(hidden, draft_vocab_size(config), bias=False)
        self.add_vocabulary(config)
        self.markov_head: nn.Module | None = None
        self.confidence_head: nn.Module | None = None

    @property
    def slots(self) -> int:
        """K, the tokens that a block drafts."""
        return self.block_size - self.first_slot

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def hidden_states(
        self,
        noise: Tensor,
        context_features: Tensor,
        anchor_positions: Tensor,
        document_ids: Tensor | None = None,
        spans: np.ndarray | None = None,
    ) -> Tensor:
        """Compute the blocks' final states.

        Args:
            noise: the blocks' input `[B, N*K, H]`, from `create_noise_embed`.
            context_features: `[B, S, L*H]`, or `[B, S, L, H]` of any strides.
            anchor_positions: `[B, N]`.
            document_ids: `[B, S]`, if a row holds several documents.
            spans: context of each block, known on the host, from `masks.context_spans`; None takes it from
                the anchors.

        Returns:
            `[B, N, rows of a block, H]`, after the final norm.
        """
        rows, seq_len = context_features.shape[:2]
        arguments = (anchor_positions, seq_len, self.block_size, document_ids)
        masks: dict[int | None, Mask] = {}
        for window in dict.fromkeys(self.windows):
            if self.attention == "flex":
                masks[window] = flex_block_mask(*arguments, window)
            else:
                masks[window] = sdpa_mask(*arguments, window, spans)
        by_layer = tuple(masks[window] for window in self.windows)
        if document_ids is None:
            positions = torch.arange(seq_len, device=noise.device).expand(rows, -1)
        else:
            positions = restarting_positions(document_ids)
        slots = create_position_ids(positions.gather(1, anchor_positions), self.block_size)
        # Under autocast keep the dtype: autocast casts them anyway. The same copy joins separate layers.
        keep = torch.is_autocast_enabled(noise.device.type)
        dtype = context_features.dtype if keep else self.fc.weight.dtype
        context_features = context_features.to(dtype, memory_format=torch.contiguous_format).flatten(2)
        return self.backbone(noise, context_features, torch.cat([positions, slots], dim=1), by_layer)

    def backbone(
        self,
        noise: Tensor,
        context_features: Tensor,
        positions: Tensor,
        masks: Sequence[Mask],
    ) -> Tensor:
        """Compute the blocks' final states from prepared inputs. This is the part that is compiled.

        Args:
            noise: `[B, N*K, H]`.
            context_features: `[B, S, L*H]`.
            positions: position ids of context and slots, `[B, S + N*K]`.
            masks: mask of each layer from `train.draft.blocks.masks`; layers of a kind share theirs.

        Returns:
            `[B, N, K, H]`.
        """
        context = self.hidden_norm(self.fc(context_features))  # [B, S, H]
        rotary = self.rotary_emb(noise, positions)  # 2 x [B, S + N*K, D]
        block = noise
        for layer, mask in zip(self.layers, masks, strict=True):
            if self.activation_checkpointing and torch.is_grad_enabled():
                block = checkpoint(layer, block, context, rotary, mask, use_reentrant=False)
            else:
                block = layer(block, context, rotary, mask)
        return self.norm(block).unflatten(1, (-1, self.block_size))

    def draft_blocks(
        self,
        input_ids: Tensor,
        target_hidden_states: Tensor,
        loss_mask: Tensor,
        anchor_positions: Tensor | None = None,
        block_keep_mask: Tensor | None = None,
        document_ids: Tensor | None = None,
        spans: np.ndarray | None = None,
    ) -> DraftBlocks:
        """Compute a training forward up to the vocabulary; arguments as in `forward` and `hidden_states`.

        Raises:
            ValueError: the context features' width does not fit the draft's layers, or only one of
                `anchor_positions` and `block_keep_mask` is given.
        """
        check_features(self, target_hidden_states)
        seq_len = input_ids.shape[1]
        input_ids = input_ids.long()
        if (anchor_positions is None) != (block_keep_mask is None):
            raise ValueError("anchor_positions and block_keep_mask go together: give both or neither")
        if anchor_positions is None or block_keep_mask is None:
            anchor_positions, block_keep_mask = sample_anchor_positions(
                seq_len,
                loss_mask,
                self.config.num_anchors,
                input_ids.device,
                document_ids=document_ids,
            )
        labels, safe = label_positions(anchor_positions, self.slots, seq_len)  # [B, N, K]
        rows = torch.arange(len(input_ids), device=input_ids.device)[:, None, None]
        target_ids = input_ids[rows, safe]  # [B, N, K]
        noise = create_noise_embed(
            self.embed_tokens,
            input_ids,
            anchor_positions,
            block_keep_mask,
            self.config.mask_token_id,
            self.block_size,
        )
        hidden = self.hidden_states(
            noise * self.embedding_scale, target_hidden_states, anchor_positions, document_ids, spans
        )
        hidden = hidden[:, :, self.first_slot :]
        anchors = input_ids.gather(1, anchor_positions)[..., None]
        previous = torch.cat([anchors, target_ids[..., :-1]], dim=-1)  # teacher-forced
        latent, confidence = self.heads(hidden, previous)
        return DraftBlocks(
            hidden=hidden,
            latent=latent,
            target_ids=target_ids,
            teacher_positions=safe - 1,
            eval_mask=build_eval_mask(seq_len, loss_mask, labels, safe, block_keep_mask, document_ids),
            block_keep_mask=block_keep_mask,
            anchor_positions=anchor_positions,
            confidence_pred=confidence,
        )

    @property
    def sees_tokens(self) -> bool:
        """True if a head's bias on the logits can begin as a map of the token before; False here."""
        return False

    def begin_bias(self, of_tokens: Tensor, mean: Tensor, covariance: Tensor, root: Tensor) -> None:
        """Make a fresh head's bias that of a linear map of the token before; nothing happens without one.

        Args:
            of_tokens: map from the token's embedding, less the mean, to a state, whose logits are the bias,
                `[H, H]`.
            mean: of the embeddings `[H]`.
            covariance: of the embeddings `[H, H]`.
            root: root of the logits' covariance by states `[H, H]`.
        """

    def heads(self, hidden: Tensor, previous: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Apply the heads that see the token before each slot's label; there are none here.

        Args:
            hidden: block states `[B, N, K, H]`.
            previous: `[B, N, K]`.

        Returns:
            The Markov head's latents `[B, N, K, R]`, and confidence logits `[B, N, K]`; None without a head.
        """
        return None, None

    def draft_logits(self, hidden: Tensor, latent: Tensor | None = None) -> Tensor:
        """Return the fp32 logits `[.., Vd]` of block states `[.., H]` and Markov latents `[.., R]`."""
        logits = head_logits(hidden, self.lm_head.weight, self.softcap, self.logit_scale)
        return logits if latent is None else logits + self.markov_head(latent)
