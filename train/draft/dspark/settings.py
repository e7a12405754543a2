"""Settings of a DSpark draft. Defaults are the paper's."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from train.config import LossConfig, require
from train.draft.blocks.settings import BlockDraftConfig
from train.draft.tables import SEARCHED, KindTables


@dataclass(frozen=True, kw_only=True)
class DSparkConfig(BlockDraftConfig):
    """`[draft]` of a DSpark draft."""

    kind: Literal["dspark"] = "dspark"
    """Kind of draft."""
    markov_head: Literal["vanilla", "gated", "rnn", "none"] = "vanilla"
    """Markov head, which biases a slot's logits by the token before it. vLLM serves vanilla only."""
    markov_rank: int = 256
    """R, the rank of the Markov head."""
    confidence_head: bool = True
    """Predict each slot's probability of being accepted by the target."""
    confidence_with_markov: bool = True
    """Feed the previous token's Markov embedding to the confidence head as well."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.markov_head == "none" or self.markov_rank >= 1,
            f'markov_rank must be at least 1 with markov_head "{self.markov_head}", got {self.markov_rank}: '
            'set markov_head = "none" for a draft without a Markov head',
        )
        require(
            not (self.confidence_head and self.confidence_with_markov) or self.markov_head != "none",
            'confidence_with_markov needs a Markov head, but markov_head is "none": set '
            "confidence_with_markov or confidence_head to false",
        )


@dataclass(frozen=True, kw_only=True)
class DSparkLoss(LossConfig):
    """`[loss]` of a DSpark draft: weights of terms and slots, by default the paper's (section 3.3)."""

    ce_alpha: float = 0.1
    """Weight of the cross entropy with the data's token."""
    l1_alpha: float = 0.9
    """Weight of the L1 distance between the draft's and target's distributions (2 x total variation)."""
    soft_ce_alpha: float | None = None
    """Weight of the cross entropy with the target's distribution; not computed when not set."""
    confidence_alpha: float = 1.0
    """Weight of the confidence head's binary cross entropy."""
    decay_gamma: float | None = 4.0
    """Slot k has weight exp(-k / gamma); "none" gives all slots the same weight."""

    def __post_init__(self) -> None:
        super().__post_init__()
        trained = self.ce_alpha + self.l1_alpha + (self.soft_ce_alpha or 0) > 0
        require(trained, "ce_alpha, l1_alpha and soft_ce_alpha can't all be 0")
        gamma = self.decay_gamma
        require(gamma is None or gamma > 0, f'decay_gamma must be positive or "none", got {gamma}')

    @property
    def slot_decay(self) -> float | None:
        return self.decay_gamma


# The published settings (DSpark paper, 2026, for Qwen3 targets).
PUBLISHED = {
    "draft.num_layers": "5",
    "draft.block_size": "7",
    "draft.markov_rank": "256",
    "loss.ce_alpha": "0.1",
    "loss.l1_alpha": "0.9",
    "loss.confidence_alpha": "1.0",
    "loss.decay_gamma": "4.0",
    "train.epochs": "10",
    "train.anchors_per_batch": "512 per sample",
    "train.micro_batches_per_step": "512 samples",
    "train.optimizer": "adamw",
    "train.lr": "6e-4",
    "train.warmup_ratio": "0.04",
    "train.min_lr_ratio": "0.1",
    "train.beta1": "0.9",
    "train.beta2": "0.95",
    "train.weight_decay": "0.0",
    "train.max_grad_norm": "1.0",
}


def implied_settings(varied: Collection[str], draft: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the settings that a point of a grid over Markov heads needs, unless the user made them.

    A confidence head can't see the Markov embedding of a draft without a Markov head.

    Args:
        varied: dotted names of the grid's settings.
        draft: the point's `[draft]` table.
    """
    if "draft.markov_head" not in varied or draft.get("markov_head") != "none":
        return ()
    if "confidence_with_markov" in draft or not draft.get("confidence_head", True):
        return ()
    return ("draft.confidence_with_markov=false",)


DSPARK_TABLES = KindTables(
    name="dspark",
    title="DSpark",
    kind="train.draft.dspark.kind:DSPARK",
    draft=DSparkConfig,
    loss=DSparkLoss,
    published=PUBLISHED,
    implied=implied_settings,
    searched=(
        *SEARCHED,
        "train.markov_lr_scale=1..50",
        "loss.decay_gamma=1..16",
        "loss.ce_alpha=0.01..1",  # against l1_alpha: only the ratio counts
        "loss.soft_ce_alpha=0.01..1",
    ),
)
