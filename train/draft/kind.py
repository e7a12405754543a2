"""Interface of a kind of draft, for training, evaluation, decoding and export.

To add a kind: add a folder next to `dspark/` with a `DraftKind`, and a row in `train.draft.TABLES`. No code
outside that folder names the kind's classes.

All kinds share these words. An *anchor* is a supervised position whose successor is supervised too. The draft
sees the target's features before it, in its document, and its token. *Slot* k, from 0 to K - 1, drafts the
token at anchor + k + 1. A slot is supervised if all tokens from the anchor's successor to its own label are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from pipeline.cache import CacheReader, Manifest
from train.config import DraftConfig, LossConfig, RunConfig, TrainConfig
from train.data.loader import Arguments, Collate, Pack
from train.data.sampling import AnchorChoice, drawn_anchors
from train.draft.serving import GgufLayout, Rule
from train.draft.speculators import SpeculatorsForm
from train.draft.tables import KindTables
from train.losses.slots import LossSums, SlotFigures


class StepResult(Protocol):
    """Result of a module's forward."""

    loss: Tensor
    sums: LossSums
    slots: SlotFigures


class TrainerModule(Protocol):
    """A draft with its objective, an `nn.Module` that maps batches to losses."""

    draft_model: Any
    """The draft, a `PreTrainedModel` with `embed_tokens`, `lm_head`, `layers`, `attention` and
    `initialize_embeddings_and_head`. Its config has `target_layer_ids`."""

    def __call__(
        self, *, denominator: Tensor | None = None, observe: bool = False, **tensors: Tensor | np.ndarray
    ) -> StepResult:
        """Draft and compute the loss.

        Args:
            denominator: divisor of the loss; None takes the sum of slot weights of this forward.
            observe: record the slots where draft and target have the same most likely token.
            tensors: tensors of a batch, from `Batch.tensors`.
        """

    def prepare(self, config: RunConfig, device: torch.device, *, by_layer: bool = False) -> None:
        """Set how the draft runs on a device: attention kernel, compilation, checkpointing.

        Args:
            by_layer: compile layer by layer, which sharded layers need.
        """

    def pieces(self, tensors: Arguments, blocks: int) -> Iterator[Arguments]:
        """Split the arguments of a forward into parts of at most `blocks` blocks each."""


@dataclass(frozen=True)
class Drafted:
    """n drafted tokens, n at most K."""

    tokens: Tensor
    """`[n]` int64."""
    probs: Tensor | None
    """Distribution that each token was sampled from, `[n, V]` fp32; None at temperature 0."""


class Decoder(Protocol):
    """A draft that drafts for one sequence."""

    slots: int
    """K, the most tokens of a round. With a lower number it drafts fewer, the first ones of a block."""
    has_confidence: bool
    """True if the draft has a confidence head, which a threshold needs."""

    def reset(self) -> None:
        """Forget the context."""

    def extend(self, features: Tensor, tokens: Tensor) -> None:
        """Append the next T positions to the context.

        Args:
            features: the target's context features there, `[T, L*H]`.
            tokens: ids of the tokens there, `[T]`.
        """

    def draft(
        self,
        anchor: int | Tensor,
        temperature: float = 0.0,
        *,
        threshold: float = 0.0,
        confidence_temperatures: Sequence[float] | None = None,
        generator: torch.Generator | None = None,
    ) -> Drafted:
        """Draft the tokens after an anchor, which follows the context directly.

        Args:
            anchor: token id.
            temperature: sampling temperature; 0 takes the most likely token.
            threshold: stop before the first slot at which the product of the confidences, the slot's own
                included, is lower. 0 drafts all slots.
            confidence_temperatures: divisor of each slot's confidence logit, `[K]`.
            generator: random generator on the draft's device.
        """


@dataclass(frozen=True, kw_only=True)
class DraftKind:
    """A kind of draft: its classes and functions."""

    tables: KindTables
    """Name and settings of the kind."""
    config_class: type[PretrainedConfig]
    """Class of the draft's Hugging Face config."""
    config: Callable[[DraftConfig, PretrainedConfig, Manifest, tuple[int, ...], int], PretrainedConfig]
    """Build the draft's config from `[draft]`, the target's config, the cache's manifest, layers and N."""
    config_fields: tuple[str, ...]
    """Fields of that config that its class lacks."""
    resolved: tuple[str, ...]
    """Settings of `[draft]` that the cache and its target decide where they are not set. They have the same
    names in the draft's config."""
    slots: Callable[[PretrainedConfig], int]
    """Return K, the tokens that the draft drafts in a round."""
    exported: Callable[[PretrainedConfig], dict[str, Any]]
    """Return what config.json states for engines, besides what drafts of all kinds state."""
    served: Callable[[PretrainedConfig], Mapping[str, Any]]
    """Return how each engine is told to serve a draft: vLLM and TensorRT-LLM by the speculative config
    without the draft's path, SGLang by the name of the algorithm."""
    describe: Callable[[PretrainedConfig], list[str]]
    """Facts of a draft for its model card, a line each in Markdown."""
    weight_fields: Callable[[Mapping[str, Any]], dict[str, Any]]
    """Return the values of a config that decide what weights mean, even if shapes are equal."""
    architectures: tuple[str, ...]
    """Names in a released config.json's `architectures` by which the kind is known."""
    check_released: Callable[[Mapping[str, Any], str], None]
    """Check a released config.json. Raise RunError if it describes no draft of this kind."""
    released_settings: Callable[
        [Mapping[str, Any], Mapping[str, Tensor], str], tuple[dict[str, Any], dict[str, Any]]
    ]
    """Return `[draft]` for a released config and weights, and the config with defaults filled in."""
    released_weights: Callable[[dict[str, Tensor], Mapping[str, Any]], dict[str, Tensor]] = field(
        default=lambda weights, _values: weights
    )
    """Return a released draft's weights, by the names of a run's. Arguments: the weights, the config."""
    needs_last_hidden: Callable[[RunConfig], bool]
    """Return whether a run needs the target's last hidden states, which a cache may lack."""
    build: Callable[[PretrainedConfig], Any]
    """Build a draft in fp32 with random weights."""
    initialise: Callable[[Any, DraftConfig, CacheReader, np.ndarray], None]
    """Set initial weights that come from training samples (`draft.init`), on the draft's device."""
    module: Callable[[Any, LossConfig], TrainerModule]
    """Combine a draft and its objective, by the `[loss]` table."""
    attention: Callable[[DraftConfig, PretrainedConfig, torch.device], None]
    """Check that the attention kernel of `[draft]` can run on a device. Raise ConfigError if not."""
    anchors: Callable[[TrainConfig, int], AnchorChoice] | None
    """Return training's choice of anchors in an epoch; None if training takes every candidate."""
    collate: Callable[[AnchorChoice, int], Collate]
    """Return the collate function for a choice of anchors, and the least number of blocks of a pack. Where
    the draft is compiled, packs of one size are compiled once."""
    least_blocks: Callable[[DraftConfig], int]
    """Return the number of blocks below which a compiled draft would be compiled again."""
    decoder: Callable[[Any], Decoder]
    """Return a decoder of a draft."""
    flops: Callable[[PretrainedConfig, Pack], float]
    """Return the FLOPs of a forward and backward over a pack."""
    lr_scales: Callable[[TrainConfig], Mapping[str, float]]
    """Return multiples of the learning rate by prefix of parameter names; other parameters have 1."""
    matrices: tuple[str, ...]
    """Prefixes of the names of parameters whose matrices Muon trains."""
    rules: Mapping[str, tuple[Rule, ...]]
    """Rules of each engine, by the names that `dspark export --to` takes."""
    gguf: GgufLayout
    """Layout of the kind's files for llama.cpp."""
    targets: Mapping[str, frozenset[str]]
    """Names of the targets' classes that pass their hidden states to drafts of this kind, by engine. Engines
    whose targets are not known are absent."""
    notes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Facts of engines with drafts of this kind, for the model card, by engine: what was seen, and limits."""
    speculators: SpeculatorsForm
    """The kind's form in the speculators library."""

    @property
    def name(self) -> str:
        """Name of the kind in `draft.kind`."""
        return self.tables.name

    @property
    def title(self) -> str:
        """Name of the kind for people."""
        return self.tables.title

    def training_anchors(self, train: TrainConfig, epoch: int) -> AnchorChoice:
        """Return training's choice of anchors in an epoch."""
        return drawn_anchors(None, train.seed) if self.anchors is None else self.anchors(train, epoch)

    def on(
        self, model: nn.Module, config: RunConfig, device: torch.device, *, by_layer: bool = False
    ) -> TrainerModule:
        """Return a draft, which must be on the device, with a run's objective, ready to run there."""
        module = self.module(model, config.loss)
        module.prepare(config, device, by_layer=by_layer)
        return module
