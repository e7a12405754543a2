"""Settings of a DFlash draft. Defaults are those of its paper (arXiv 2602.06036, appendix A.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from train.config import LossConfig, require
from train.draft.blocks.settings import BlockDraftConfig
from train.draft.tables import SEARCHED, KindTables


@dataclass(frozen=True, kw_only=True)
class DFlashConfig(BlockDraftConfig):
    """`[draft]` of a DFlash draft."""

    kind: Literal["dflash"] = "dflash"
    """Kind of draft."""
    block_size: int = 16
    """Rows of a block: the anchor's, which drafts nothing, and one of a mask token per drafted token."""

    def __post_init__(self) -> None:
        super().__post_init__()
        size = self.block_size
        require(size >= 2, f"block_size must be at least 2, an anchor and a slot, got {size}")


@dataclass(frozen=True, kw_only=True)
class DFlashLoss(LossConfig):
    """`[loss]` of a DFlash draft: weights of the terms and of the slots."""

    ce_alpha: float = 1.0
    """Weight of the cross entropy with the data's token."""
    l1_alpha: float = 0.0
    """Weight of the L1 distance to the target's distribution, which needs the last hidden states."""
    slot_weights: Literal["decay", "dpace"] = "decay"
    """Weights of the slots: decay by decay_gamma, or D-PACE, by its confidence (arXiv 2605.18810), with which
    evaluations weigh all slots alike."""
    decay_gamma: float | None = 7.0
    """Slot k has weight exp(-k / gamma), k from 0; "none" gives all slots the same weight. Not with dpace."""
    dpace_smoothing: float = 0.5
    """D-PACE's share of 1 in each slot's confidence, which keeps the weights of later slots above 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.ce_alpha + self.l1_alpha > 0, "ce_alpha and l1_alpha can't both be 0")
        gamma = self.decay_gamma
        require(gamma is None or gamma > 0, f'decay_gamma must be positive or "none", got {gamma}')
        smoothing = self.dpace_smoothing
        require(0 < smoothing <= 1, f"dpace_smoothing must be above 0 and at most 1, got {smoothing}")

    @property
    def slot_decay(self) -> float | None:
        return self.decay_gamma if self.slot_weights == "decay" else None

    @property
    def smoothing(self) -> float | None:
        """D-PACE's share of 1 in each slot's confidence; None without D-PACE."""
        return self.dpace_smoothing if self.slot_weights == "dpace" else None


# The published settings (DFlash paper, 2026; its recipe as NVIDIA NeMo-Automodel ships it for Qwen3).
PUBLISHED = {
    "draft.num_layers": "5",
    "draft.block_size": "16",
    "loss.ce_alpha": "1.0",
    "loss.decay_gamma": "7.0",
    "loss.dpace_smoothing": "0.5",
}


DFLASH_TABLES = KindTables(
    name="dflash",
    title="DFlash",
    kind="train.draft.dflash.kind:DFLASH",
    draft=DFlashConfig,
    loss=DFlashLoss,
    published=PUBLISHED,
    searched=(*SEARCHED, "loss.decay_gamma=1..32", "loss.l1_alpha=0..3"),
)
