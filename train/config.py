"""Settings of a training run: the tables of its TOML file. `train.draft.settings` builds them.

The tables `[draft]` and `[loss]` depend on the kind of draft: its folder in `train/draft/` has their classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from pipeline.cache.split import BATCH_TOKENS, EPOCHS, HELD_OUT, MICRO_BATCHES_PER_STEP
from pipeline.config import show
from pipeline.errors import ConfigError

# The largest integer that every library used here accepts as a count or a seed.
MOST = 2**53


def require(condition: bool, message: str) -> None:
    """Raise ConfigError unless a condition holds."""
    if not condition:
        raise ConfigError(message)


def check_numbers(table: object) -> None:
    """Raise ConfigError when a number is infinite, NaN or above MOST in magnitude."""
    for name, value in vars(table).items():
        if isinstance(value, float):
            require(math.isfinite(value), f"{name} must be a finite number, got {value}")
        elif isinstance(value, int):
            require(abs(value) <= MOST, f"{name} must be at most {MOST}, got {show(value)}")


@dataclass(frozen=True, kw_only=True)
class DraftConfig:
    """`[draft]`: the model. Each kind of draft has a subclass with its own settings."""

    kind: str
    """Kind of draft."""
    target_layer_ids: tuple[int, ...] | None = None
    """Captured layers that the draft reads, any subset of the cache's; all of them when not set."""
    num_attention_heads: int | None = None
    """Query heads; the target's when not set."""
    num_key_value_heads: int | None = None
    """Key and value heads; the target's when not set."""
    head_dim: int | None = None
    """Width of an attention head; the target's when not set."""
    intermediate_size: int | None = None
    """Width of the MLP; the target's when not set."""
    draft_vocab_size: int | None = None
    """Tokens that the draft can draft, the most frequent ones of the answers; all when not set."""
    init_from: str | None = None
    """Draft to start from: a run, one of its checkpoints, or a directory in DeepSpec's layout."""

    def __post_init__(self) -> None:
        check_numbers(self)
        heads = ("num_attention_heads", "num_key_value_heads", "head_dim")
        for name in (*heads, "intermediate_size", "draft_vocab_size"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} must be at least 1, got {value}")
        require(
            self.head_dim is None or self.head_dim % 2 == 0, f"head_dim must be even, got {self.head_dim}"
        )
        ids = self.target_layer_ids
        require(ids != (), "target_layer_ids must name at least one layer")
        require(
            ids is None or list(ids) == sorted(set(ids)),
            f"target_layer_ids must be strictly increasing, got {list(ids or ())}: sort them, each once",
        )


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """`[loss]`: the objective. Each kind of draft has a subclass with the weights of its terms.

    The weight of the term `<name>` of `train.losses.slots.TERMS` is called `<name>_alpha`.
    """

    kernel: Literal["auto", "triton", "torch"] = "auto"
    """Pass over the vocabulary: auto is triton on NVIDIA GPUs from compute capability 8.0, else torch."""

    def __post_init__(self) -> None:
        check_numbers(self)
        weights = {name: value for name, value in vars(self).items() if name.endswith("_alpha")}
        for name, value in weights.items():
            require(value is None or value >= 0, f"{name} must not be negative, got {value}")

    @property
    def slot_decay(self) -> float | None:
        """Gamma of the slots' weights exp(-k / gamma), k from 0; None weighs all slots alike."""
        return None


_COUNTS = (
    "epochs",
    "batch_tokens",
    "anchors_per_batch",
    "micro_batches_per_step",
    "keep_checkpoints",
    "max_skipped_steps",
    "eval_anchors",
    "log_every",
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """`[train]`: data order, optimiser, schedule, evaluation, logs and checkpoints."""

    epochs: int = EPOCHS
    """Passes over the training samples, unless max_steps is set."""
    max_steps: int | None = None
    """Optimiser steps; overrides epochs."""
    batch_tokens: int = BATCH_TOKENS
    """P, tokens per micro-batch: whole samples are packed into one row of this length."""
    anchors_per_batch: int = 512
    """N, blocks trained per micro-batch, divided among its samples in proportion to their candidates."""
    micro_batches_per_step: int = MICRO_BATCHES_PER_STEP
    """Micro-batches per optimiser step, divided among the ranks: the world size does not change the run."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """muon trains the matrices of fc and the layers with Muon, the rest with AdamW."""
    lr: float = 6e-4
    """Peak learning rate."""
    markov_lr_scale: float = 1.0
    """Multiple of lr for the Markov head, and for DFlash2's codebooks: rows are tokens, most of them rare."""
    warmup_ratio: float = 0.04
    """Share of the steps that warm up: the learning rate rises linearly."""
    min_lr_ratio: float = 0.1
    """Share of the peak learning rate at which the cosine schedule ends."""
    beta1: float = 0.9
    """AdamW's decay rate of the first moment."""
    beta2: float = 0.95
    """AdamW's decay rate of the second moment."""
    weight_decay: float = 0.0
    """AdamW's weight decay, applied to matrices only."""
    max_grad_norm: float = 1.0
    """Global norm that gradients are clipped to."""
    seed: int = 0
    """Seed of the initial weights, the data order and the anchors."""
    shuffle_shards: int | None = None
    """Shards shuffled together, so that an epoch reads each shard in one part; all when not set."""
    reader: Literal["auto", "mmap", "direct"] = "auto"
    """Reads through the page cache (mmap) or past it (direct); auto tries both for more than memory holds."""
    local_cache_dir: str | None = None
    """Folder for shards fetched from an object store; by default DSPARK_LOCAL_CACHE or the user's caches."""
    local_cache_bytes: int | None = None
    """Most bytes of them, for all processes of a machine; half of what is free when not set."""
    held_out: float = HELD_OUT
    """Share of the samples kept for evaluation, chosen by a hash of their content."""
    data_share: float = 1.0
    """Share of the training samples to use, chosen by a hash of their content; 1 uses all."""
    eval_anchors: int = 32
    """Anchors per held-out sample, evenly spread over its candidates."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Compute precision: auto is bf16 autocast if the hardware supports bf16. Weights stay fp32."""
    tf32: bool = True
    """Allow TF32 in CUDA's fp32 matrix products."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile for the draft's backbone and the loss; auto is on for CUDA."""
    activation_checkpointing: bool = False
    """Recompute each draft layer in the backward pass instead of keeping its activations."""
    parallelism: Literal["ddp", "fsdp"] = "ddp"
    """Under torchrun: ddp replicates the draft on each rank, fsdp (FSDP2) shards parameters and optimiser."""
    log_every: int = 10
    """Steps between log lines."""
    report_to: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Trackers that figures are logged to, in addition to metrics.jsonl."""
    eval_every: int = 0
    """Steps between evaluations on the held-out samples; 0 evaluates only at the end."""
    early_stopping_patience: int = 0
    """Evaluations in a row without a better held-out tau after which the run stops; 0 never stops early."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 saves by time and at the end only."""
    checkpoint_minutes: float = 15.0
    """Minutes between checkpoints; 0 saves by steps and at the end only."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep, in addition to the one with the best held-out tau."""
    max_skipped_steps: int = 10
    """Steps in a row that may be skipped for a non-finite loss or gradient before the run fails."""

    def __post_init__(self) -> None:
        check_numbers(self)
        for name in _COUNTS:
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("max_steps", "shuffle_shards", "local_cache_bytes"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} must be at least 1, got {value}")
        for name in (
            "eval_every",
            "early_stopping_patience",
            "checkpoint_every",
            "checkpoint_minutes",
            "weight_decay",
            "seed",
        ):
            require(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("lr", "markov_lr_scale", "max_grad_norm"):
            require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
        require(
            not self.early_stopping_patience or (self.eval_every and self.held_out),
            "early_stopping_patience needs evaluations during training: set eval_every and held_out above 0",
        )
        require(len(set(self.report_to)) == len(self.report_to), "report_to names a tracker twice")
        require(0 < self.data_share <= 1, f"data_share must be above 0 and at most 1, got {self.data_share}")
        for name in ("warmup_ratio", "min_lr_ratio"):
            require(
                0 <= getattr(self, name) <= 1, f"{name} must be between 0 and 1, got {getattr(self, name)}"
            )
        for name in ("beta1", "beta2", "held_out"):
            require(0 <= getattr(self, name) < 1, f"{name} must be in [0, 1), got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings of a run: the whole TOML file."""

    draft: DraftConfig
    loss: LossConfig
    train: TrainConfig = field(default_factory=TrainConfig)
