"""`DraftKind` of the EAGLE-3 draft."""

from __future__ import annotations

import numpy as np
import torch
from transformers import LlamaConfig, PretrainedConfig

from pipeline.cache import CacheReader
from train.config import DraftConfig, RunConfig
from train.draft.blocks.collate import ANCHOR_MULTIPLE
from train.draft.eagle3.attention import resolve_attention
from train.draft.eagle3.collate import collate_chains
from train.draft.eagle3.config import FIELDS, describe, draft_config, exported, served, weight_fields
from train.draft.eagle3.decoder import ChainDecoder
from train.draft.eagle3.flops import training_flops
from train.draft.eagle3.model import Eagle3Model
from train.draft.eagle3.module import Eagle3TrainerModule
from train.draft.eagle3.released import ARCHITECTURES, check_released, released_settings, released_weights
from train.draft.eagle3.serving import GGUF, RULES, TARGETS
from train.draft.eagle3.settings import EAGLE3_TABLES, Eagle3Config, Eagle3Loss
from train.draft.eagle3.speculators import SPECULATORS
from train.draft.kind import DraftKind
from train.draft.serving import PROVED
from train.losses.slots import Objective


def _needs_last_hidden(config: RunConfig) -> bool:
    return config.loss.soft_ce_alpha > 0 or config.loss.l1_alpha > 0


def _build(config: PretrainedConfig) -> Eagle3Model:
    return Eagle3Model(config).float()


def _nothing(model: Eagle3Model, draft: DraftConfig, reader: CacheReader, samples: np.ndarray) -> None:
    """Leave the weights random."""


def _module(model: Eagle3Model, loss: Eagle3Loss) -> Eagle3TrainerModule:
    return Eagle3TrainerModule(model, Objective.of(loss))


def _check_attention(draft: Eagle3Config, config: PretrainedConfig, device: torch.device) -> None:
    if draft.attention != "auto":  # auto can't fail; it is tried when the draft is prepared
        resolve_attention(draft.attention, config, device)


EAGLE3 = DraftKind(
    tables=EAGLE3_TABLES,
    config_class=LlamaConfig,
    config=draft_config,
    config_fields=FIELDS,
    resolved=(
        "target_layer_ids",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
    ),
    slots=lambda config: config.ttt_steps,
    exported=exported,
    served=served,
    describe=describe,
    weight_fields=weight_fields,
    architectures=ARCHITECTURES,
    check_released=check_released,
    released_settings=released_settings,
    released_weights=released_weights,
    needs_last_hidden=_needs_last_hidden,
    build=_build,
    initialise=_nothing,
    module=_module,
    attention=_check_attention,
    anchors=None,
    collate=collate_chains,
    least_blocks=lambda _draft: ANCHOR_MULTIPLE,
    decoder=ChainDecoder,
    flops=training_flops,
    lr_scales=lambda _train: {},
    matrices=("fc.", "midlayer."),
    rules=RULES,
    notes=PROVED,
    gguf=GGUF,
    targets=TARGETS,
    speculators=SPECULATORS,
)
