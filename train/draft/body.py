"""Parts of a draft's Hugging Face config that come from its target."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from pipeline.cache import Manifest
from pipeline.errors import ConfigError
from train.config import DraftConfig
from train.draft.serving import scale_of

# The fields of a config that decide its tensors' shapes.
DIMENSIONS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)

# Fields of every draft that engines read.
_EXPORTED = (
    *DIMENSIONS,
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "attention_bias",
    "attention_dropout",
)


def body(draft: DraftConfig, target: PretrainedConfig, manifest: Manifest) -> dict[str, Any]:
    """Return the fields of a Llama-like config with the target's dimensions, without biases.

    The number of layers is the kind's own.

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
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": draft.head_dim or own("head_dim") or hidden // heads,
        "hidden_act": "silu",
        "max_position_embeddings": own("max_position_embeddings") or 32768,
        "rms_norm_eps": own("rms_norm_eps") or 1e-6,
        "rope_parameters": _rope_parameters(text),
        "attention_bias": False,
        "tie_word_embeddings": False,
        "embedding_scale": identity.embedding_scale,
        "logit_scale": identity.logit_scale,
        "final_logit_softcapping": identity.final_logit_softcapping,
    }


def body_export(config: PretrainedConfig) -> dict[str, Any]:
    """Return what an exported config states of a draft's body: none is None, names are those engines read."""
    rope = dict(config.rope_parameters)
    values = {
        "model_type": config.model_type,
        **{name: getattr(config, name) for name in _EXPORTED},
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],  # the older names, with rope_scaling below
        "tie_word_embeddings": False,
    }
    if rope.get("rope_type", "default") != "default":
        values["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    for name in ("embedding_scale", "logit_scale"):  # only our own class reads embedding_scale
        if scale_of(config, name) != 1:
            values[name] = getattr(config, name)
    if getattr(config, "final_logit_softcapping", None) is not None:
        values["final_logit_softcapping"] = config.final_logit_softcapping
    return values


def _rope_parameters(text: PretrainedConfig) -> dict[str, Any]:
    """Return the target's rotary settings. If it has several sets (Gemma 3), return its global layers'."""
    rope = getattr(text, "rope_parameters", None) or {}
    rope = dict(rope.get("full_attention", rope))
    if rope.pop("partial_rotary_factor", 1.0) != 1 and rope.get("rope_type") == "longrope":
        # longrope has one factor per rotated pair of the target's heads; the draft rotates all pairs.
        rope = {"rope_theta": rope.get("rope_theta", 10000.0)}
    return {"rope_theta": getattr(text, "rope_theta", None) or 10000.0, "rope_type": "default", **rope}
