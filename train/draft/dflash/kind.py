"""`DraftKind` of the DFlash draft."""

from __future__ import annotations

from functools import partial

from transformers import PretrainedConfig, Qwen3Config

from train.data.loader import Pack
from train.draft.blocks.collate import collate_anchors
from train.draft.blocks.decoder import BlockDecoder
from train.draft.blocks.flops import block_flops
from train.draft.blocks.parts import (
    BLOCK_MATRICES,
    BLOCK_RESOLVED,
    check_attention,
    drawn_blocks,
    least_blocks,
    ridge_if_asked,
)
from train.draft.dflash.config import (
    ARCHITECTURE,
    FIELDS,
    describe,
    draft_config,
    exported,
    served,
    weight_fields,
)
from train.draft.dflash.model import Qwen3DFlashModel
from train.draft.dflash.module import DFlashTrainerModule
from train.draft.dflash.released import check_released, released_settings
from train.draft.dflash.ridge import ridge_initialise
from train.draft.dflash.serving import GGUF, RULES, TARGETS
from train.draft.dflash.settings import DFLASH_TABLES, DFlashLoss
from train.draft.dflash.speculators import SPECULATORS
from train.draft.kind import DraftKind
from train.draft.serving import PROVED
from train.losses.slots import Objective


def _build(config: PretrainedConfig) -> Qwen3DFlashModel:
    return Qwen3DFlashModel(config).float()


def _module(model: Qwen3DFlashModel, loss: DFlashLoss) -> DFlashTrainerModule:
    return DFlashTrainerModule(model, Objective.of(loss), loss.smoothing)


def _slots(config: PretrainedConfig) -> int:
    return config.block_size - Qwen3DFlashModel.first_slot


def _flops(config: PretrainedConfig, pack: Pack) -> float:
    return block_flops(config, pack, _slots(config))


DFLASH = DraftKind(
    tables=DFLASH_TABLES,
    config_class=Qwen3Config,
    config=draft_config,
    config_fields=FIELDS,
    resolved=BLOCK_RESOLVED,
    slots=_slots,
    exported=exported,
    served=served,
    describe=describe,
    weight_fields=weight_fields,
    architectures=(ARCHITECTURE,),
    check_released=check_released,
    released_settings=released_settings,
    needs_last_hidden=lambda config: config.loss.l1_alpha > 0,
    build=_build,
    initialise=partial(ridge_if_asked, by=ridge_initialise),
    module=_module,
    attention=check_attention,
    anchors=drawn_blocks,
    collate=collate_anchors,
    least_blocks=least_blocks,
    decoder=BlockDecoder,
    flops=_flops,
    lr_scales=lambda _train: {},
    matrices=BLOCK_MATRICES,
    rules=RULES,
    notes=PROVED,
    gguf=GGUF,
    targets=TARGETS,
    speculators=SPECULATORS,
)
