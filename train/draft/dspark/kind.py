"""`DraftKind` of the DSpark draft."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PretrainedConfig, Qwen3Config

from train.config import RunConfig, TrainConfig
from train.draft.blocks.collate import collate_anchors
from train.draft.blocks.parts import (
    BLOCK_MATRICES,
    BLOCK_RESOLVED,
    check_attention,
    drawn_blocks,
    least_blocks,
    ridge_if_asked,
)
from train.draft.dspark.config import FIELDS, describe, draft_config, exported, served, weight_fields
from train.draft.dspark.decoder import DraftDecoder
from train.draft.dspark.flops import training_flops
from train.draft.dspark.model import Qwen3DSparkModel
from train.draft.dspark.module import DSparkTrainerModule
from train.draft.dspark.released import ARCHITECTURES, check_released, released_settings
from train.draft.dspark.serving import GGUF, NOTES, RULES, TARGETS
from train.draft.dspark.settings import DSPARK_TABLES, DSparkLoss
from train.draft.dspark.speculators import SPECULATORS
from train.draft.kind import DraftKind
from train.losses.slots import Objective


def _needs_last_hidden(_config: RunConfig) -> bool:
    return True  # the L1 term, the confidence, and the acceptance by which the best draft is kept


def _build(config: PretrainedConfig) -> Qwen3DSparkModel:
    return Qwen3DSparkModel(config).float()


def _module(model: Qwen3DSparkModel, loss: DSparkLoss) -> DSparkTrainerModule:
    return DSparkTrainerModule(model, objective=Objective.of(loss))


def _lr_scales(train: TrainConfig) -> Mapping[str, float]:
    return {"markov_head.": train.markov_lr_scale}


DSPARK = DraftKind(
    tables=DSPARK_TABLES,
    config_class=Qwen3Config,
    config=draft_config,
    config_fields=FIELDS,
    resolved=BLOCK_RESOLVED,
    slots=lambda config: config.block_size,
    exported=exported,
    served=served,
    describe=describe,
    weight_fields=weight_fields,
    architectures=ARCHITECTURES,
    check_released=check_released,
    released_settings=released_settings,
    needs_last_hidden=_needs_last_hidden,
    build=_build,
    initialise=ridge_if_asked,
    module=_module,
    attention=check_attention,
    anchors=drawn_blocks,
    collate=collate_anchors,
    least_blocks=least_blocks,
    decoder=DraftDecoder,
    flops=training_flops,
    lr_scales=_lr_scales,
    matrices=BLOCK_MATRICES,
    rules=RULES,
    gguf=GGUF,
    targets=TARGETS,
    notes=NOTES,
    speculators=SPECULATORS,
)
