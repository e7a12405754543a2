"""Settings of a DFlash2 draft. Defaults of the architecture are those of the drafts of its authors.

They did not publish how they train. The selector's weight is that of NVIDIA NeMo-Automodel and speculators.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from train.config import require
from train.draft.dflash.settings import DFlashConfig, DFlashLoss
from train.draft.tables import KindTables


@dataclass(frozen=True, kw_only=True)
class DFlash2Config(DFlashConfig):
    """`[draft]` of a DFlash2 draft."""

    kind: Literal["dflash2"] = "dflash2"
    """Kind of draft."""
    conv_kernel_size: int = 2
    """Rows of a block that a convolution reads: a row's own and those before it."""
    conv_group_size: int = 16
    """Channels that share what a convolution's weights change with its input; it divides the hidden size."""
    selector_rank: int = 256
    """Width of the selector's embeddings of a token and of its predecessor."""
    selector_top_k: int = 16
    """Candidates of a slot: its most likely tokens, from which the selector chooses."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        require(
            self.conv_kernel_size <= self.block_size,
            f"conv_kernel_size must be at most block_size = {self.block_size}, got {self.conv_kernel_size}",
        )
        require(
            self.draft_vocab_size is None,
            "draft_vocab_size must not be set: the selector of a DFlash2 draft is known to choose among all "
            f"of the target's tokens, got {self.draft_vocab_size}",
        )


@dataclass(frozen=True, kw_only=True)
class DFlash2Loss(DFlashLoss):
    """`[loss]` of a DFlash2 draft: DFlash's, which make the candidates, and the selector's."""

    selector_alpha: float = 1.0
    """Weight of the cross entropy of the selector's choice, of slots whose label is a candidate."""


PUBLISHED = {
    "draft.conv_kernel_size": "2",
    "draft.conv_group_size": "16",
    "draft.selector_rank": "256",
    "draft.selector_top_k": "16",
}


DFLASH2_TABLES = KindTables(
    name="dflash2",
    title="DFlash2",
    kind="train.draft.dflash2.kind:DFLASH2",
    draft=DFlash2Config,
    loss=DFlash2Loss,
    published=PUBLISHED,
)
