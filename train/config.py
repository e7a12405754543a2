"""Settings of a training run: the tables of its TOML file. Defaults are the paper's settings."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from pipeline.cache.split import BATCH_TOKENS, EPOCHS, HELD_OUT, MICRO_BATCHES_PER_STEP
from pipeline.config import show
from pipeline.errors import ConfigError

# The largest integer that every library used here accepts as a count or a seed.
MOST = 2**53


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _check_numbers(table: object) -> None:
    """Raise ConfigError when a number is infinite, NaN or above MOST in magnitude."""
    for name, value in vars(table).items():
        if isinstance(value, float):
            _require(math.isfinite(value), f"{name} must be a finite number, got {value}")
        elif isinstance(value, int):
            _require(abs(value) <= MOST, f"{name} must be at most {MOST}, got {show(value)}")


@dataclass(frozen=True, kw_only=True)
class DraftConfig:
    """`[draft]`: the model."""

    kind: Literal["dspark"] = "dspark"
    """Kind of draft."""
    num_layers: int = 5
    """Draft decoder layers."""
    block_size: int = 7
    """K, drafted tokens per block."""
    target_layer_ids: tuple[int, ...] | None = None
    """Captured layers that the draft reads, any subset of the cache's; all of them when not set."""
    mask_token_id: int | None = None
    """Id that stands for a token to be drafted; an id that the tokenizer does not use when not set."""
    markov_head: Literal["vanilla", "gated", "rnn", "none"] = "vanilla"
    """Markov head, which biases a slot's logits by the token before it. vLLM serves vanilla only."""
    markov_rank: int = 256
    """R, the rank of the Markov head."""
    confidence_head: bool = True
    """Predict each slot's probability of being accepted by the target."""
    confidence_with_markov: bool = True
    """Feed the previous token's Markov embedding to the confidence head as well."""
    num_attention_heads: int | None = None
    """Query heads; the target's when not set."""
    num_key_value_heads: int | None = None
    """Key and value heads; the target's when not set."""
    head_dim: int | None = None
    """Width of an attention head; the target's when not set."""
    intermediate_size: int | None = None
    """Width of the MLP; the target's when not set."""
    sliding_window: int | None = None
    """Positions that a slot of a sliding layer sees, its own included; layers see everything when not set."""
    layer_types: tuple[Literal["sliding_attention", "full_attention"], ...] | None = None
    """Attention of each layer; all slide when not set and sliding_window is."""
    init: Literal["random", "ridge"] = "random"
    """Initial weights: ridge sets fc and the first layer by regression on the cache, for short runs."""
    init_from: str | None = None
    """Draft to start from instead: a run, one of its checkpoints, or a directory in DeepSpec's layout."""
    attention: Literal["auto", "sdpa", "flex"] = "auto"
    """Attention kernel: flex skips what a block can't see; auto is flex if it runs on the CUDA device."""

    def __post_init__(self) -> None:
        _check_numbers(self)
        for name in ("num_layers", "block_size"):
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        self._check_window()
        for name in ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size"):
            value = getattr(self, name)
            _require(value is None or value >= 1, f"{name} must be at least 1, got {value}")
        _require(
            self.head_dim is None or self.head_dim % 2 == 0, f"head_dim must be even, got {self.head_dim}"
        )
        _require(
            self.markov_head == "none" or self.markov_rank >= 1,
            f'markov_rank must be at least 1 with markov_head "{self.markov_head}", got {self.markov_rank}: '
            'set markov_head = "none" for a draft without a Markov head',
        )
        _require(
            not (self.confidence_head and self.confidence_with_markov) or self.markov_head != "none",
            'confidence_with_markov needs a Markov head, but markov_head is "none": set '
            "confidence_with_markov or confidence_head to false",
        )
        _require(
            self.init_from is None or self.init == "random",
            f'init_from and init = "{self.init}" both set the initial weights: set only one of them',
        )
        ids = self.target_layer_ids
        _require(ids != (), "target_layer_ids must name at least one layer")
        _require(
            ids is None or list(ids) == sorted(set(ids)),
            f"target_layer_ids must be strictly increasing, got {list(ids or ())}: sort them, each once",
        )

    def _check_window(self) -> None:
        """Raise ConfigError if the window and the layers' types don't fit each other."""
        window, types = self.sliding_window, self.layer_types
        _require(
            # Engines differ on which of a block's own slots lie outside a shorter window.
            window is None or window >= self.block_size,
            f"sliding_window must be at least block_size = {self.block_size}, so that a block sees itself, "
            f"got {window}",
        )
        _require(
            types is None or len(types) == self.num_layers,
            f"layer_types must have num_layers = {self.num_layers} entries, got {len(types or ())}",
        )
        _require(
            window is not None or "sliding_attention" not in (types or ()),
            "layer_types has sliding_attention, but sliding_window is not set: set its number of positions",
        )
        _require(
            window is None or types is None or "sliding_attention" in types,
            f"sliding_window is {window}, but layer_types has no sliding_attention: remove one of them",
        )


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """`[loss]`: weights of the three terms and of the slots (DSpark paper, section 3.3)."""

    ce_alpha: float = 0.1
    """Weight of the cross entropy with the data's token."""
    l1_alpha: float = 0.9
    """Weight of the L1 distance between the draft's and target's distributions (2 x total variation)."""
    confidence_alpha: float = 1.0
    """Weight of the confidence head's binary cross entropy."""
    decay_gamma: float | None = 4.0
    """Slot k has weight exp(-k / gamma); "none" gives all slots the same weight."""
    kernel: Literal["auto", "triton", "torch"] = "auto"
    """Pass over the vocabulary: auto is triton on NVIDIA GPUs from compute capability 8.0, else torch."""

    def __post_init__(self) -> None:
        _check_numbers(self)
        for name in ("ce_alpha", "l1_alpha", "confidence_alpha"):
            _require(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        _require(self.ce_alpha + self.l1_alpha > 0, "ce_alpha and l1_alpha can't both be 0")
        gamma = self.decay_gamma
        _require(gamma is None or gamma > 0, f'decay_gamma must be positive or "none", got {gamma}')


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
    """Multiple of lr for the Markov head: its rows are tokens, most of which are rare."""
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
    held_out: float = HELD_OUT
    """Share of the samples kept for evaluation, chosen by a hash of their content."""
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
        _check_numbers(self)
        for name in _COUNTS:
            _require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        _require(
            self.max_steps is None or self.max_steps >= 1,
            f"max_steps must be at least 1, got {self.max_steps}",
        )
        for name in (
            "eval_every",
            "early_stopping_patience",
            "checkpoint_every",
            "checkpoint_minutes",
            "weight_decay",
            "seed",
        ):
            _require(getattr(self, name) >= 0, f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("lr", "markov_lr_scale", "max_grad_norm"):
            _require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
        _require(
            not self.early_stopping_patience or (self.eval_every and self.held_out),
            "early_stopping_patience needs evaluations during training: set eval_every and held_out above 0",
        )
        _require(len(set(self.report_to)) == len(self.report_to), "report_to names a tracker twice")
        for name in ("warmup_ratio", "min_lr_ratio"):
            _require(
                0 <= getattr(self, name) <= 1, f"{name} must be between 0 and 1, got {getattr(self, name)}"
            )
        for name in ("beta1", "beta2", "held_out"):
            _require(0 <= getattr(self, name) < 1, f"{name} must be in [0, 1), got {getattr(self, name)}")


# The published settings (DSpark paper, 2026, for Qwen3 targets).
PAPER = {
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


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings of a run: the whole TOML file."""

    draft: DraftConfig = field(default_factory=DraftConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
