"""From a run's `[draft]` table and the target's config to the draft's Hugging Face config.

This is the one place where a run's short names become the names that vLLM and SGLang read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig, Qwen3Config

from pipeline.cache import Manifest
from pipeline.errors import CacheError, ConfigError
from train.config import DraftConfig


def default_mask_token_id(manifest: Manifest) -> int:
    """A token id that conversations don't use, to stand for a token to be drafted.

    The tokenizer's mask token; else the first id behind its vocabulary, where the target's embedding
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


def read_target_config(folder: Path) -> PretrainedConfig:
    """The target's own config, from a cache's `target/`; its code, if it brings any, is not run.

    Raises:
        CacheError: it can't be read.
    """
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
    try:  # a model type that only its own code knows: the dimensions have the field's usual names
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if "auto_map" in values:
            return PretrainedConfig.from_dict(values.get("text_config", values))
    except (OSError, ValueError, AttributeError):
        pass
    raise CacheError(f"{folder / 'config.json'} can't be read ({reason}): capture again")


def draft_config(
    draft: DraftConfig,
    target: PretrainedConfig,
    manifest: Manifest,
    layer_ids: tuple[int, ...],
    num_anchors: int = 512,
) -> Qwen3Config:
    """The draft's config: Qwen3's body with the target's dimensions, and DSpark's own fields.

    Args:
        draft: the run's `[draft]` table; None means as in the target.
        target: the target's own config.
        manifest: the cache's; says H, V, number of layers, the scales and the soft-cap.
        layer_ids: the captured layers the draft reads.
        num_anchors: N, recorded for whoever draws anchors by the config.

    Raises:
        ConfigError: a combination no draft can have.
    """
    identity, text = manifest.identity.target, target.get_text_config()

    def own(name: str) -> Any:
        return getattr(text, name, None)

    hidden = identity.hidden_size
    heads = draft.num_attention_heads or own("num_attention_heads") or max(1, hidden // 64)
    kv_heads = draft.num_key_value_heads or own("num_key_value_heads") or heads
    head_dim = draft.head_dim or own("head_dim") or hidden // heads
    if heads % kv_heads:
        raise ConfigError(
            f"draft: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    mask_token_id = (
        draft.mask_token_id if draft.mask_token_id is not None else default_mask_token_id(manifest)
    )
    if not 0 <= mask_token_id < identity.vocab_size:
        raise ConfigError(
            f"draft.mask_token_id {mask_token_id} is outside the vocabulary of {identity.vocab_size}"
        )
    return Qwen3Config(
        architectures=["Qwen3DSparkModel"],
        vocab_size=identity.vocab_size,
        hidden_size=hidden,
        intermediate_size=draft.intermediate_size or own("intermediate_size") or 4 * hidden,
        num_hidden_layers=draft.num_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        hidden_act="silu",
        max_position_embeddings=own("max_position_embeddings") or 32768,
        rms_norm_eps=own("rms_norm_eps") or 1e-6,
        rope_parameters=_rope_parameters(text),
        attention_bias=False,
        tie_word_embeddings=False,
        layer_types=["full_attention"] * draft.num_layers,
        block_size=draft.block_size,
        num_anchors=num_anchors,
        mask_token_id=mask_token_id,
        target_layer_ids=list(layer_ids),
        num_target_layers=identity.num_layers,
        markov_rank=draft.markov_rank if draft.markov_head != "none" else 0,
        markov_head_type=draft.markov_head,
        enable_confidence_head=draft.confidence_head,
        confidence_head_with_markov=draft.confidence_with_markov and draft.markov_head != "none",
        embedding_scale=identity.embedding_scale,
        logit_scale=identity.logit_scale,
        final_logit_softcapping=identity.final_logit_softcapping,
    )


def _rope_parameters(text: PretrainedConfig) -> dict[str, Any]:
    """The target's rotary settings; where it has several sets (Gemma 3), those of its global layers."""
    rope = getattr(text, "rope_parameters", None) or {}
    rope = dict(rope.get("full_attention", rope))
    if rope.pop("partial_rotary_factor", 1.0) != 1 and rope.get("rope_type") == "longrope":
        # Its factors are one a rotated pair of the target's heads; the draft's heads rotate whole.
        rope = {"rope_theta": rope.get("rope_theta", 10000.0)}
    return {"rope_theta": getattr(text, "rope_theta", None) or 10000.0, "rope_type": "default", **rope}
