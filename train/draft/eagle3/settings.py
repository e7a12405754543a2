"""Settings of an EAGLE-3 draft. Defaults are those of the published recipes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from train.config import DraftConfig, LossConfig, require
from train.draft.tables import SEARCHED, KindTables


@dataclass(frozen=True, kw_only=True)
class Eagle3Config(DraftConfig):
    """`[draft]` of an EAGLE-3 draft. It has one layer: engines differ on deeper ones."""

    kind: Literal["eagle3"] = "eagle3"
    """Kind of draft."""
    ttt_steps: int = 7
    """K, steps that training unrolls the draft on its own hidden states, and tokens drafted in a round."""
    fc_norm: bool = False
    """Normalise each captured layer's states before fc joins them (EAGLE 3.1)."""
    norm_output: bool = False
    """Feed the hidden state back after the final norm instead of before it (EAGLE 3.1)."""
    train_head: bool = True
    """Train the output head, which starts as the target's; false keeps it frozen."""
    attention: Literal["auto", "sdpa", "flex"] = "auto"
    """Attention kernel: flex skips what a chain can't see; auto is flex if it runs on the CUDA device."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.ttt_steps >= 1, f"ttt_steps must be at least 1, got {self.ttt_steps}")


@dataclass(frozen=True, kw_only=True)
class Eagle3Loss(LossConfig):
    """`[loss]` of an EAGLE-3 draft: weights of the terms and of the steps."""

    soft_ce_alpha: float = 1.0
    """Weight of the cross entropy with the target's distribution, restricted to the draft's vocabulary."""
    ce_alpha: float = 0.0
    """Weight of the cross entropy with the data's token."""
    l1_alpha: float = 0.0
    """Weight of the L1 distance between the draft's and target's distributions (2 x total variation)."""
    step_decay: float = 0.8
    """Step k of the unroll, from 0, has weight step_decay ** k."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.soft_ce_alpha + self.ce_alpha + self.l1_alpha > 0,
            "soft_ce_alpha, ce_alpha and l1_alpha can't all be 0",
        )
        require(0 < self.step_decay <= 1, f"step_decay must be in (0, 1], got {self.step_decay}")

    @property
    def slot_decay(self) -> float | None:
        return None if self.step_decay == 1 else -1 / math.log(self.step_decay)


# DeepSpec's and SpecForge's settings, which have no common learning rate.
PUBLISHED = {"draft.ttt_steps": "7", "loss.step_decay": "0.8"}


EAGLE3_TABLES = KindTables(
    name="eagle3",
    title="EAGLE-3",
    kind="train.draft.eagle3.kind:EAGLE3",
    draft=Eagle3Config,
    loss=Eagle3Loss,
    published=PUBLISHED,
    # At a rate of 1e-3 gradients grow through the unroll until the run diverges.
    searched=("train.lr=3e-5..1e-3", *SEARCHED[1:], "loss.step_decay=0.5..1"),
)
