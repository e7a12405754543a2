"""DFlash2 draft model (https://inco.ai/blog/dflash2/). Parameter names are those that engines load."""

from __future__ import annotations

from torch import nn
from transformers import Qwen3Config

from train.draft.blocks.model import BlockDraftModel
from train.draft.dflash2.layers import BlockConvolution, ConvolvedDecoderLayer
from train.draft.dflash2.selector import CandidateSelector


class Qwen3DFlash2Model(BlockDraftModel):
    """A DFlash2 draft. As made, it drafts what a DFlash draft of the same weights drafts."""

    _no_split_modules = ("ConvolvedDecoderLayer",)
    layer_class = ConvolvedDecoderLayer
    first_slot = 1

    def __init__(self, config: Qwen3Config):
        super().__init__(config)
        self.candidate_selector = CandidateSelector(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, BlockConvolution | CandidateSelector):  # after the linear maps in them
            module.reset()
