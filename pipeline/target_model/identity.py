"""Identities of the target and its tokenizer, for a cache's manifest."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from pipeline.cache import TargetIdentity, TokenizerIdentity
from pipeline.hooks import embedding_scale, final_logit_softcapping, find_layers, logit_scale


def target_identity(name: str, weights: str, model: nn.Module, dtype: torch.dtype) -> TargetIdentity:
    """Return a target's identity; the model may be on the meta device."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    return TargetIdentity(
        name=name,
        weights=weights,
        architecture=type(model).__name__,
        model_type=model.config.get_text_config().model_type,
        hidden_size=embeddings.weight.shape[1],
        num_layers=len(find_layers(model)),
        vocab_size=embeddings.weight.shape[0],
        dtype=str(dtype).removeprefix("torch."),
        tied_embeddings=head.weight is embeddings.weight,
        embedding_scale=embedding_scale(model),
        logit_scale=logit_scale(model),
        final_logit_softcapping=final_logit_softcapping(model),
    )


def tokenizer_identity(tokenizer: Any) -> TokenizerIdentity:
    """Return a tokenizer's identity: hashes of vocabulary with merges, and of the chat template."""
    content = tokenizer.backend_tokenizer.to_str().encode()
    template = tokenizer.chat_template or ""
    return TokenizerIdentity(
        sha256=hashlib.sha256(content).hexdigest(),
        chat_template_sha256=hashlib.sha256(str(template).encode()).hexdigest(),
        length=len(tokenizer),
        mask_token_id=tokenizer.mask_token_id,
        unk_token_id=tokenizer.unk_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
