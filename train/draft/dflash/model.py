"""DFlash draft model (arXiv 2602.06036)."""

from __future__ import annotations

from transformers import Qwen3Config

from train.draft.blocks.model import BlockDraftModel


class Qwen3DFlashModel(BlockDraftModel):
    """A DFlash draft: a block of an anchor and mask tokens, row r of which drafts the token at anchor + r."""

    first_slot = 1

    def __init__(self, config: Qwen3Config):
        super().__init__(config)
        self.post_init()
