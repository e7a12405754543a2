"""Hugging Face config of block drafters, from a run's `[draft]` table and the target's config.

This is the only place that maps a run's short names to the names that vLLM and SGLang read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PretrainedConfig, Qwen3Config

from pipeline.cache import Manifest
from pipeline.errors import ConfigError
from train.draft.blocks.settings import BlockDraftConfig
from train.draft.body import DIMENSIONS, body, body_export
from train.draft.vocabulary import check_vocabulary, draft_vocab_size

# The values of `layer_types`, transformers' names.
SLIDING, FULL = "sliding_attention", "full_attention"
# Fields that Qwen3's config lacks.
BLOCK_FIELDS = ("block_size", "num_anchors", "mask_token_id", "target_layer_ids", "num_target_layers")
_SAY_NOTHING_OF_WEIGHTS = ("block_size", "num_anchors")


def block_weights(values: Mapping[str, Any], fields: Sequence[str]) -> dict[str, Any]:
    """Return the values of a config that decide what its weights mean.

    Args:
        fields: the kind's fields that Qwen3's config lacks.
    """
    names = [*DIMENSIONS, *(name for name in fields if name not in _SAY_NOTHING_OF_WEIGHTS)]
    found = {name: values[name] for name in names if name in values}
    if "vocab_size" in found:
        found["draft_vocab_size"] = values.get("draft_vocab_size") or found["vocab_size"]
    return found


def block_config(
    draft: BlockDraftConfig,
    target: PretrainedConfig,
    manifest: Manifest,
    layer_ids: tuple[int, ...],
    num_anchors: int,
    **own: Any,
) -> Qwen3Config:
    """Return a draft's config: Qwen3's body with the target's dimensions, and what all block drafters have.

    Args:
        draft: the run's `[draft]` table; a setting that is None is taken from the target.
        target: the target's own config.
        manifest: the cache's manifest.
        layer_ids: the captured layers the draft reads.
        num_anchors: N, recorded for code that draws anchors by the config.
        own: further fields of the kind.

    Raises:
        ConfigError: the heads don't fit each other, or there is no valid mask token.
    """
    return Qwen3Config(
        **body(draft, target, manifest),
        num_hidden_layers=draft.num_layers,
        **_window(draft),
        block_size=draft.block_size,
        num_anchors=num_anchors,
        mask_token_id=mask_token_id(draft, manifest),
        target_layer_ids=list(layer_ids),
        num_target_layers=manifest.identity.target.num_layers,
        **_vocabulary(draft, manifest),
        **own,
    )


def block_export(config: PretrainedConfig, fields: Sequence[str]) -> dict[str, Any]:
    """Return what an exported config states for engines.

    Args:
        fields: the kind's fields that Qwen3's config lacks.
    """
    values = {
        **body_export(config),
        "use_sliding_window": config.use_sliding_window,
        "layer_types": list(config.layer_types),
        **{name: getattr(config, name) for name in fields},
    }
    if draft_vocab_size(config) != config.vocab_size:
        values["draft_vocab_size"] = config.draft_vocab_size
    if slides(config):  # engines hide a block's later slots in sliding layers, unless told not to
        values |= {"sliding_window": config.sliding_window, "is_causal": False}
    return values


def describe_windows(config: PretrainedConfig) -> list[str]:
    """Return a line on the layers that see only a window; none if there are no such layers."""
    own = [str(i) for i, kind in enumerate(config.layer_types) if kind == SLIDING]
    if not own:
        return []
    which = "every layer" if len(own) == config.num_hidden_layers else f"of the layers {', '.join(own)}"
    return [f"sliding attention, {which}: a slot sees {config.sliding_window} positions, its own included"]


def _vocabulary(draft: BlockDraftConfig, manifest: Manifest) -> dict[str, int]:
    """Return the field of a reduced vocabulary; none for the target's own."""
    vocab = manifest.identity.target.vocab_size
    size = check_vocabulary(draft.draft_vocab_size, vocab)
    return {"draft_vocab_size": size} if size < vocab else {}


def slides(config: PretrainedConfig) -> bool:
    """Return whether a draft has layers that see only a window."""
    return SLIDING in (getattr(config, "layer_types", None) or ())


def _window(draft: BlockDraftConfig) -> dict[str, Any]:
    """Return the fields of a `Qwen3Config` that say which layers see only a window."""
    sliding = draft.sliding_window is not None
    types = draft.layer_types or (SLIDING if sliding else FULL,) * draft.num_layers
    window = {"use_sliding_window": True, "sliding_window": draft.sliding_window} if sliding else {}
    return {"layer_types": list(types), **window}


def mask_token_id(draft: BlockDraftConfig, manifest: Manifest) -> int:
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
