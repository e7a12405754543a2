"""Parts of a draft's Hugging Face config that come from its target: Qwen3's body and the mask token."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from pipeline.cache import Manifest
from pipeline.errors import ConfigError
from train.config import DraftConfig

# The fields of a `Qwen3Config` that decide its tensors' shapes.
DIMENSIONS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)

# The values of `layer_types`, transformers' names.
SLIDING, FULL = "sliding_attention", "full_attention"


def qwen3_body(draft: DraftConfig, target: PretrainedConfig, manifest: Manifest) -> dict[str, Any]:
    """Return the fields of a `Qwen3Config` with the target's dimensions, without biases.

    Args:
        draft: the run's `[draft]` table; a setting that is None is taken from the target.
        target: the target's own config.
        manifest: the cache's manifest; gives H, V, the scales and the soft-cap.

    Raises:
        ConfigError: the query heads are not a multiple of the key and value heads.
    """
    identity, text = manifest.identity.target, target.get_text_config()

    def own(name: str) -> Any:
        return getattr(text, name, None)

    hidden = identity.hidden_size
    heads = draft.num_attention_heads or own("num_attention_heads") or max(1, hidden // 64)
    kv_heads = draft.num_key_value_heads or own("num_key_value_heads") or heads
    if heads % kv_heads:
        raise ConfigError(
            f"draft.num_attention_heads must be a multiple of draft.num_key_value_heads, got {heads} and "
            f"{kv_heads}"
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
        **_window(draft),
        "embedding_scale": identity.embedding_scale,
        "logit_scale": identity.logit_scale,
        "final_logit_softcapping": identity.final_logit_softcapping,
    }


def slides(config: PretrainedConfig) -> bool:
    """Return whether a draft has layers that see only a window."""
    return SLIDING in (getattr(config, "layer_types", None) or ())


def _window(draft: DraftConfig) -> dict[str, Any]:
    """Return the fields of a `Qwen3Config` that say which layers see only a window."""
    sliding = draft.sliding_window is not None
    types = draft.layer_types or (SLIDING if sliding else FULL,) * draft.num_layers
    window = {"use_sliding_window": True, "sliding_window": draft.sliding_window} if sliding else {}
    return {"layer_types": list(types), **window}


def mask_token_id(draft: DraftConfig, manifest: Manifest) -> int:
    """Return the id of the mask token, which stands for a token to be drafted.

    Raises:
        ConfigError: the id is outside the vocabulary, or the tokenizer offers none.
    """
    token, vocab = draft.mask_token_id, manifest.identity.target.vocab_size
    token = default_mask_token_id(manifest) if token is None else token
    if not 0 <= token < vocab:
        raise ConfigError(f"draft.mask_token_id must be in [0, {vocab}), the vocabulary, got {token}")
    return token


def default_mask_token_id(manifest: Manifest) -> int:
    """Return a token id that conversations don't use, as the mask token.

    It is the first that exists of: the tokenizer's mask token; the first id after its vocabulary, if the
    target's embedding has padding rows (Qwen3: 151669); its unknown token; its padding token.

    Raises:
        ConfigError: none of them exists.
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
    """Return the target's rotary settings. If it has several sets (Gemma 3), return its global layers'."""
    rope = getattr(text, "rope_parameters", None) or {}
    rope = dict(rope.get("full_attention", rope))
    if rope.pop("partial_rotary_factor", 1.0) != 1 and rope.get("rope_type") == "longrope":
        # longrope has one factor per rotated pair of the target's heads; the draft rotates all pairs.
        rope = {"rope_theta": rope.get("rope_theta", 10000.0)}
    return {"rope_theta": getattr(text, "rope_theta", None) or 10000.0, "rope_type": "default", **rope}
