"""Hugging Face config of a DFlash2 draft, and the fields that engines read of it.

vLLM 0.33.0 (`model_executor/models/qwen3_dflash2.py`) and SGLang 0.5.23 (`srt/models/dflash.py`) read the
convolutions, the selector and the target's scales from `dflash_config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig, Qwen3Config

from pipeline.cache import Manifest
from pipeline.errors import ConfigError
from train.draft.blocks.config import BLOCK_FIELDS, block_config, block_weights
from train.draft.dflash import config as dflash
from train.draft.dflash2.settings import DFlash2Config

OWN = ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")
"""Fields that DFlash's config lacks."""
FIELDS = (*BLOCK_FIELDS, *OWN)
ARCHITECTURE = "DFlash2DraftModel"
SCALES = {
    "embedding_scale": ("input_embedding_scale", 1.0),
    "logit_scale": ("output_multiplier", 1.0),
    "final_logit_softcapping": ("final_logit_softcapping", None),
}
"""Names in `dflash_config` of the scales that a draft shares with its target, with what changes nothing."""


def weight_fields(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a config that decide what its weights mean."""
    fields = [name for name in FIELDS if name != "selector_top_k"]
    return block_weights({**values, **values.get("dflash_config", {})}, fields)


def draft_config(
    draft: DFlash2Config,
    target: PretrainedConfig,
    manifest: Manifest,
    layer_ids: tuple[int, ...],
    num_anchors: int = 512,
) -> Qwen3Config:
    """Return the draft's config; arguments and errors are as of `block_config`.

    Raises:
        ConfigError: the groups don't divide the hidden size, or there are more candidates than tokens.
    """
    own = {name: getattr(draft, name) for name in OWN}
    config = block_config(
        draft, target, manifest, layer_ids, num_anchors, architectures=[ARCHITECTURE], **own
    )
    if config.hidden_size % config.conv_group_size:
        raise ConfigError(
            f"draft.conv_group_size must divide the target's hidden size {config.hidden_size}, got "
            f"{config.conv_group_size}"
        )
    if config.selector_top_k > config.vocab_size:
        raise ConfigError(
            f"draft.selector_top_k must be at most {config.vocab_size}, the target's tokens, got "
            f"{config.selector_top_k}"
        )
    return config


def exported(config: PretrainedConfig) -> dict[str, Any]:
    """Return what an exported config states for engines."""
    values = dflash.exported(config)
    values["dflash_config"] |= {name: getattr(config, name) for name in OWN}
    for name, (theirs, neutral) in SCALES.items():
        scale = getattr(config, name, None)
        if scale not in (None, neutral):
            values["dflash_config"][theirs] = scale
    return values


def served(config: PretrainedConfig) -> dict[str, Any]:
    """Return how engines are told to serve a draft."""
    values = dflash.served(config)
    # Without draft_sample_method vLLM drafts greedily for requests that sample, and accepts less of them.
    return values | {"vllm": values["vllm"] | {"draft_sample_method": "probabilistic"}}


def describe(config: PretrainedConfig) -> list[str]:
    """Return what a model card tells of the block, the convolutions and the selector."""
    block, *windows = dflash.describe(config)
    return [
        block,
        *windows,
        f"convolutions over {config.conv_kernel_size} rows of a block, in groups of "
        f"{config.conv_group_size} channels",
        f"selector of rank {config.selector_rank}, which chooses among {config.selector_top_k} candidates",
    ]
