"""`DraftKind` of the DSpark draft."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from transformers import PretrainedConfig, Qwen3Config

from pipeline.cache import CacheReader
from train.config import DraftConfig, RunConfig, TrainConfig
from train.draft.dspark.attention import resolve_attention
from train.draft.dspark.collate import collate_anchors
from train.draft.dspark.config import DECLARED, FIELDS, describe, draft_config, weight_fields
from train.draft.dspark.decoder import DraftDecoder
from train.draft.dspark.flops import training_flops
from train.draft.dspark.model import Qwen3DSparkModel
from train.draft.dspark.module import DSparkTrainerModule
from train.draft.dspark.released import check_released, released_settings
from train.draft.dspark.ridge import ridge_initialise
from train.draft.dspark.serving import RULES
from train.draft.kind import DraftKind
from train.losses.slots import Objective


def _needs_last_hidden(_config: RunConfig) -> bool:
    return True  # the L1 term, the confidence, and the acceptance by which the best draft is kept


def _build(config: PretrainedConfig) -> Qwen3DSparkModel:
    return Qwen3DSparkModel(config).float()


def _initialise(
    model: Qwen3DSparkModel, draft: DraftConfig, reader: CacheReader, samples: np.ndarray
) -> None:
    if draft.init == "ridge":
        ridge_initialise(model, reader, samples)


def _module(model: Qwen3DSparkModel, objective: Objective) -> DSparkTrainerModule:
    return DSparkTrainerModule(model, objective=objective)


def _lr_scales(train: TrainConfig) -> Mapping[str, float]:
    return {"markov_head.": train.markov_lr_scale}


DSPARK = DraftKind(
    name="dspark",
    config_class=Qwen3Config,
    config=draft_config,
    config_fields=FIELDS,
    declared=DECLARED,
    describe=describe,
    weight_fields=weight_fields,
    check_released=check_released,
    released_settings=released_settings,
    needs_last_hidden=_needs_last_hidden,
    build=_build,
    initialise=_initialise,
    module=_module,
    attention=resolve_attention,
    collate=collate_anchors,
    decoder=DraftDecoder,
    flops=training_flops,
    lr_scales=_lr_scales,
    rules=RULES,
)
