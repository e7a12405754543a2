"""The parts of a draft's Hugging Face config that it takes from its target: Qwen3's body, the mask token."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from pipeline.cache import Manifest
from pipeline.errors import ConfigError
from train.config import DraftConfig


def qwen3_body(draft: DraftConfig, target: PretrainedConfig, manifest: Manifest) -> dict[str, Any]:
    """Return the fields of a `Qwen3Config` with the target's dimensions, without biases.

    Args:
        draft: the run's `[draft]` table; None means as in the target.
        target: the target's own config.
        manifest: the cache's; says H, V, the scales and the soft-cap.

    Raises:
        ConfigError: the heads don't fit.
    """
    identity, text = manifest.identity.target, target.get_text_config()

    def own(name: str) -> Any:
        return getattr(text, name, None)

    hidden = identity.hidden_size
    heads = draft.num_attention_heads or own("num_attention_heads") or max(1, hidden // 64)
    kv_heads = draft.num_key_value_heads or own("num_key_value_heads") or heads
    if heads % kv_heads:
        raise ConfigError(
            f"draft: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    return {
        "vocab_size": identity.vocab_size,
        "hidden_size": hidden,
        "intermediate_size": draft.intermediate_size or own("intermediate_size") or 4 * hidden,
        "num_hidden_layers": draft.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": draft.head_dim or own("head_dim") or hidden // heads,
        "hidden_act": "silu",
        "max_position_embeddings": own("max_position_embeddings") or 32768,
        "rms_norm_eps": own("rms_norm_eps") or 1e-6,
        "rope_parameters": _rope_parameters(text),
        "attention_bias": False,
        "tie_word_embeddings": False,
        "layer_types": ["full_attention"] * draft.num_layers,
        "embedding_scale": identity.embedding_scale,
        "logit_scale": identity.logit_scale,
        "final_logit_softcapping": identity.final_logit_softcapping,
    }


def mask_token_id(draft: DraftConfig, manifest: Manifest) -> int:
    """Return the id of the token that stands for one to be drafted.

    Raises:
        ConfigError: it is outside the vocabulary, or none can be found.
    """
    token, vocab = draft.mask_token_id, manifest.identity.target.vocab_size
    token = default_mask_token_id(manifest) if token is None else token
    if not 0 <= token < vocab:
        raise ConfigError(f"draft.mask_token_id {token} is outside the vocabulary of {vocab}")
    return token


def default_mask_token_id(manifest: Manifest) -> int:
    """Return a token id that conversations don't use, to stand for a token to be drafted.

    The tokenizer's mask token; else the first id after its vocabulary, where the target's embedding
    has padding rows (Qwen3: 151669); else its unknown token; else its padding token.
    """
    tokenizer = manifest.identity.tokenizer
    if tokenizer.mask_token_id is not None:
        return tokenizer.mask_token_id
    if tokenizer.length < manifest.identity.target.vocab_size:
        return tokenizer.length
    for token_id in (tokenizer.unk_token_id, tokenizer.pad_token_id):
        if token_id is not None:
            return token_id
    raise ConfigError("the target's tokenizer has no mask, unknown or padding token: set draft.mask_token_id")


def _rope_parameters(text: PretrainedConfig) -> dict[str, Any]:
    """Return the target's rotary settings; of several sets (Gemma 3) those of its global layers."""
    rope = getattr(text, "rope_parameters", None) or {}
    rope = dict(rope.get("full_attention", rope))
    if rope.pop("partial_rotary_factor", 1.0) != 1 and rope.get("rope_type") == "longrope":
        # It has a factor per rotated pair of the target's heads; the draft's heads rotate whole.
        rope = {"rope_theta": rope.get("rope_theta", 10000.0)}
    return {"rope_theta": getattr(text, "rope_theta", None) or 10000.0, "rope_type": "default", **rope}
