"""EAGLE-3 draft: one layer that continues the target's states, token by token.

Row t pairs the target's features of position t with the token at t + 1. The chain of an anchor a starts in
row a - 1: step k takes the token at a + k, and a hidden state, at first that of the row and then its own of
the step before, and drafts the token at a + k + 1. It sees the rows up to its own, and the keys of its own
steps after the first, whose keys are the row's.

Rows are of one layer, so only their keys and values are computed; all else is computed for chains alone.
Parameter names are those that vLLM and SGLang load.

Shapes: B rows of a batch, S tokens, N anchors, K steps, L layers, H hidden size, V the target's vocabulary,
Vd the draft's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from pipeline.features import head_logits
from train.draft.blocks.anchors import build_eval_mask, label_positions, restarting_positions
from train.draft.blocks.attention import BlockRotaryEmbedding
from train.draft.blocks.model import DraftBlocks, check_features
from train.draft.eagle3.attention import View, attend_context, flex_view, grouped_view, join_own
from train.draft.eagle3.layers import Eagle3Layer
from train.draft.vocabulary import ReducedVocabulary


class Eagle3Model(PreTrainedModel, ReducedVocabulary):
    """An EAGLE-3 draft for a target of any family.

    Args:
        config: a `LlamaConfig` with the fields `train.draft.eagle3.config.FIELDS`, and if the target has
            them `embedding_scale`, `logit_scale` and `final_logit_softcapping`.
    """

    config_class = LlamaConfig
    base_model_prefix = ""
    _no_split_modules = ("Eagle3Layer",)
    _supports_sdpa = True
    _tied_weights_keys = None

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        hidden, width = config.hidden_size, config.target_hidden_size
        self.slots = config.ttt_steps
        self.embedding_scale = getattr(config, "embedding_scale", None) or 1.0
        self.logit_scale = getattr(config, "logit_scale", None) or 1.0
        self.softcap = getattr(config, "final_logit_softcapping", None)
        # Not in the config: these change how the draft runs, not what it computes.
        self.attention: Literal["sdpa", "flex"] = "sdpa"
        self.flex_options: dict[str, bool | int] | None = None
        self.activation_checkpointing = False
        self.embed_tokens = nn.Embedding(config.vocab_size, hidden)
        if config.fc_norm:
            norms = (LlamaRMSNorm(width, eps=config.rms_norm_eps) for _ in config.target_layer_ids)
            self.fc_norm = nn.ModuleList(norms)
        self.fc = nn.Linear(len(config.target_layer_ids) * width, hidden, bias=False)
        self.midlayer = Eagle3Layer(config)
        self.norm = LlamaRMSNorm(hidden, eps=config.rms_norm_eps)
        self.rotary_emb = BlockRotaryEmbedding(config)
        self.lm_head = nn.Linear(hidden, config.draft_vocab_size, bias=False)
        self.add_vocabulary(config)
        self.trains_head = config.train_head
        self.post_init()

    @property
    def layers(self) -> list[nn.Module]:
        """Layers that are sharded on their own: none, as the only one is most of the draft."""
        return []

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of the weights that are the target's. Engines take the head from the draft, frozen or not."""
        return ("embed_tokens.weight",)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def embed(self, tokens: Tensor) -> Tensor:
        """Return embeddings `[.., H]` of tokens `[..]`, as the target scales them."""
        return self.embed_tokens(tokens) * self.embedding_scale

    def project(self, features: Tensor) -> Tensor:
        """Return the rows' hidden states `[.., H]` of context features `[.., L*H]`."""
        if self.config.fc_norm:
            parts = features.unflatten(-1, (len(self.fc_norm), -1)).unbind(-2)
            features = torch.cat([norm(p) for norm, p in zip(self.fc_norm, parts, strict=True)], dim=-1)
        return self.fc(features)

    def output(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return of a step's hidden states `[.., H]` those for the head, and those for the next step."""
        final = self.norm(hidden)
        return final, final if self.config.norm_output else hidden

    def draft_logits(self, hidden: Tensor) -> Tensor:
        """Return the fp32 logits `[.., Vd]` of final states `[.., H]`."""
        return head_logits(hidden, self.lm_head.weight, self.softcap, self.logit_scale)

    def unroll(
        self, rows: tuple[Tensor, Tensor], hidden: Tensor, tokens: Tensor, positions: Tensor, view: View
    ) -> Tensor:
        """Run the chains for K steps, each on the hidden state of the step before.

        Args:
            rows: keys and values of the context's rows, `[B, kv heads, S, D]`.
            hidden: the hidden states of the chains' rows, `[B, N, H]`.
            tokens: token of each step, `[B, N, K]`.
            positions: of the chains' rows in their documents, `[B, N]`.
            view: rows that each chain sees.

        Returns:
            Final states `[B, N, K, H]`.
        """
        keys: list[Tensor] = []
        values: list[Tensor] = []
        finals = []
        for number in range(self.slots):
            arguments = (number, hidden, tokens[:, :, number], positions + number, rows, view)
            if self.activation_checkpointing and torch.is_grad_enabled():
                hidden, *own = checkpoint(self._step, *arguments, keys[:], values[:], use_reentrant=False)
            else:
                hidden, *own = self._step(*arguments, keys, values)
            if number:
                keys.append(own[0])
                values.append(own[1])
            final, hidden = self.output(hidden)
            finals.append(final)
        return torch.stack(finals, dim=2)

    def _step(
        self,
        number: int,
        hidden: Tensor,
        tokens: Tensor,
        positions: Tensor,
        rows: tuple[Tensor, Tensor],
        view: View,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
    ) -> tuple[Tensor, ...]:
        """Return a step's output `[B, N, H]`, and after step 0 its keys and values `[B, kv heads, N, D]`.

        Args:
            number: k.
            hidden: `[B, N, H]`.
            tokens: `[B, N]`.
            positions: of the step, `[B, N]`.
            keys: of the steps from 1 to k - 1.
            values: likewise.
        """
        embeds = self.embed(tokens)
        states, rotary = self.midlayer.joined(embeds, hidden), self.rotary_emb(embeds, positions)
        attention = self.midlayer.self_attn
        query = attention.query(states, rotary)
        # The keys of step 0 are those of the row, which the chain sees among the context's.
        own = attention.keys_values(states, rotary) if number else ()
        attended, lse = attend_context(query, *rows, view, self.flex_options)
        if own:
            attended = join_own(query, attended, lse, [*keys, own[0]], [*values, own[1]])
        return self.midlayer.residual(hidden, attended), *own

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
        """Compute a training forward up to the vocabulary.

        Args:
            input_ids: `[B, S]`.
            target_hidden_states: context features `[B, S, L*H]`, or `[B, S, L, H]` of any strides.
            loss_mask: `[B, S]`, 0 on padding.
            anchor_positions: `[B, N]`; None takes every position, of which `block_keep_mask` keeps some.
            block_keep_mask: `[B, N]` bool; None keeps the candidates. One that begins its document is not
                kept: there is no row before it.
            document_ids: `[B, S]`, if a row holds several documents, each contiguous.
            spans: context of each anchor, known on the host, `[B, N, 2]`; from the collate function.

        Raises:
            ValueError: the context features' width does not fit the draft's layers.
        """
        check_features(self, target_hidden_states)
        input_ids, (batch, seq_len) = input_ids.long(), input_ids.shape
        places = torch.arange(seq_len, device=input_ids.device).expand(batch, -1)
        in_document = places if document_ids is None else restarting_positions(document_ids)
        anchors = places if anchor_positions is None else anchor_positions
        keep = loss_mask.gather(1, anchors) > 0.5 if block_keep_mask is None else block_keep_mask
        before = in_document.gather(1, anchors)  # rows before each anchor, in its document
        keep = keep & (before > 0)
        labels, safe = label_positions(anchors, self.slots, seq_len)  # [B, N, K]
        target_ids = input_ids.gather(1, safe.flatten(1)).view_as(safe)
        hidden = self._states(
            input_ids, target_hidden_states, anchors, target_ids, in_document, before, spans
        )
        return DraftBlocks(
            hidden=hidden,
            latent=None,
            target_ids=target_ids,
            teacher_positions=safe - 1,
            eval_mask=build_eval_mask(seq_len, loss_mask, labels, safe, keep, document_ids),
            block_keep_mask=keep,
            anchor_positions=anchors,
            confidence_pred=None,
        )

    def _states(
        self,
        input_ids: Tensor,
        features: Tensor,
        anchors: Tensor,
        target_ids: Tensor,
        in_document: Tensor,
        before: Tensor,
        spans: np.ndarray | None,
    ) -> Tensor:
        """Return the final states `[B, N, K, H]` of the anchors' chains.

        Args:
            in_document: position of each token in its document, `[B, S]`.
            before: rows before each anchor, `[B, N]`.
        """
        keep = torch.is_autocast_enabled(features.device.type)  # autocast casts them anyway
        dtype = features.dtype if keep else self.fc.weight.dtype
        states = self.project(features.to(dtype, memory_format=torch.contiguous_format).flatten(2))
        following = input_ids.roll(-1, dims=1)  # the last row of a document is seen by no chain
        embeds = self.embed(following)
        rows = self.midlayer.context(embeds, states, self.rotary_emb(embeds, in_document))
        # An anchor without a row before it is not kept. It takes its own row, so that nothing is NaN.
        first, own = anchors - before, (anchors - (before > 0).long())
        end = own + 1
        if self.attention == "flex":
            view: View = flex_view(first, end, features.shape[1])
        else:
            if spans is not None:
                spans = np.stack([spans[..., 0], np.maximum(spans[..., 1], spans[..., 0] + 1)], axis=-1)
            view = grouped_view(first, end, spans)
        hidden = states.gather(1, own[..., None].expand(-1, -1, states.shape[-1]))
        tokens = torch.cat([input_ids.gather(1, anchors)[..., None], target_ids[..., :-1]], dim=-1)
        return self.unroll(rows, hidden, tokens, in_document.gather(1, own), view)
