"""`DraftKind` of the DFlash2 draft."""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PretrainedConfig, Qwen3Config

from train.config import TrainConfig
from train.draft.blocks.collate import collate_anchors
from train.draft.blocks.parts import (
    BLOCK_MATRICES,
    BLOCK_RESOLVED,
    check_attention,
    drawn_blocks,
    least_blocks,
    ridge_if_asked,
)
from train.draft.dflash2.config import (
    ARCHITECTURE,
    FIELDS,
    describe,
    draft_config,
    exported,
    served,
    weight_fields,
)
from train.draft.dflash2.decoder import SelectingDecoder
from train.draft.dflash2.flops import training_flops
from train.draft.dflash2.model import Qwen3DFlash2Model
from train.draft.dflash2.module import DFlash2TrainerModule
from train.draft.dflash2.released import check_released, released_settings
from train.draft.dflash2.serving import GGUF, RULES, TARGETS
from train.draft.dflash2.settings import DFLASH2_TABLES, DFlash2Loss
from train.draft.dflash2.speculators import SPECULATORS
from train.draft.kind import DraftKind
from train.draft.serving import PROVED
from train.losses.slots import Objective


def _build(config: PretrainedConfig) -> Qwen3DFlash2Model:
    return Qwen3DFlash2Model(config).float()


def _module(model: Qwen3DFlash2Model, loss: DFlash2Loss) -> DFlash2TrainerModule:
    return DFlash2TrainerModule(model, Objective.of(loss), loss.smoothing)


def _lr_scales(train: TrainConfig) -> Mapping[str, float]:
    return {
        f"candidate_selector.{name}_codebook": train.markov_lr_scale for name in ("predecessor", "successor")
    }


DFLASH2 = DraftKind(
    tables=DFLASH2_TABLES,
    config_class=Qwen3Config,
    config=draft_config,
    config_fields=FIELDS,
    resolved=BLOCK_RESOLVED,
    slots=lambda config: config.block_size - Qwen3DFlash2Model.first_slot,
    exported=exported,
    served=served,
    describe=describe,
    weight_fields=weight_fields,
    architectures=(ARCHITECTURE,),
    check_released=check_released,
    released_settings=released_settings,
    needs_last_hidden=lambda config: config.loss.l1_alpha > 0,
    build=_build,
    initialise=ridge_if_asked,
    module=_module,
    attention=check_attention,
    anchors=drawn_blocks,
    collate=collate_anchors,
    least_blocks=least_blocks,
    decoder=SelectingDecoder,
    flops=training_flops,
    lr_scales=_lr_scales,
    matrices=BLOCK_MATRICES,
    rules=RULES,
    notes={"vllm": PROVED["vllm"]},
    gguf=GGUF,
    targets=TARGETS,
    speculators=SPECULATORS,
)
