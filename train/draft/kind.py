"""What training, measuring, decoding and export have to know of a kind of draft.

To add a kind: a folder beside `dspark/` with a `DraftKind`, and a row in `train.draft.DRAFTS`. Nothing
outside that folder names the kind's classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from pipeline.cache import CacheReader, Manifest
from train.config import DraftConfig, RunConfig, TrainConfig
from train.data.loader import Collate, Pack
from train.data.sampling import AnchorChoice
from train.draft.serving import Rule
from train.losses.slots import LossSums, Objective, SlotFigures


class StepResult(Protocol):
    """The outcome of a module's forward."""

    loss: Tensor
    sums: LossSums
    slots: SlotFigures


class TrainerModule(Protocol):
    """A draft with its objective, an `nn.Module`: batches in, losses out."""

    draft_model: Any
    """The draft, a `PreTrainedModel` with `embed_tokens`, `lm_head`, `layers`, `attention` and
    `initialize_embeddings_and_head`."""

    def __call__(
        self, *, denominator: Tensor | None = None, observe: bool = False, **tensors: Tensor
    ) -> StepResult:
        """Draft and compute the loss.

        Args:
            denominator: sum of slot weights over the whole optimiser step, when this is a part of it.
            observe: find out where draft and target agree.
            tensors: of `Pack.tensors`.
        """

    def prepare(self, config: RunConfig, device: torch.device, *, by_layer: bool = False) -> None:
        """Set how the draft runs on a device: attention kernel, compilation, checkpointing.

        Args:
            by_layer: compile layer by layer, as sharded layers need it.
        """

    def pieces(self, tensors: dict[str, Tensor], blocks: int) -> Iterator[dict[str, Tensor]]:
        """Split the arguments of a forward into ones of at most so many blocks each."""


@dataclass(frozen=True)
class Drafted:
    """n drafted tokens, n at most K."""

    tokens: Tensor
    """`[n]` int64."""
    probs: Tensor | None
    """The distribution that each was sampled from, `[n, V]` fp32; None at temperature 0."""


class Decoder(Protocol):
    """A draft that drafts for one sequence."""

    block_size: int
    """K."""
    has_confidence: bool
    """Whether it predicts what is accepted, so that a threshold can be set."""

    def reset(self) -> None:
        """Forget the context."""

    def extend(self, features: Tensor) -> None:
        """Take in the context features of the next positions, `[T, L*H]`."""

    def draft(
        self,
        anchor: int | Tensor,
        temperature: float = 0.0,
        *,
        threshold: float = 0.0,
        confidence_temperatures: Sequence[float] | None = None,
        generator: torch.Generator | None = None,
    ) -> Drafted:
        """Draft the tokens after an anchor, which stands right after the context.

        Args:
            anchor: token id.
            temperature: 0 takes the most likely token.
            threshold: end before the first slot that the block reaches with a lower probability. 0 drafts
                all.
            confidence_temperatures: divide each slot's confidence logit, `[K]`.
            generator: on the draft's device.
        """


@dataclass(frozen=True, kw_only=True)
class DraftKind:
    """One kind of draft."""

    name: str
    """In `draft.kind`."""
    config_class: type[PretrainedConfig]
    """Of its Hugging Face config."""
    config: Callable[[DraftConfig, PretrainedConfig, Manifest, tuple[int, ...], int], PretrainedConfig]
    """From `[draft]`, the target's config, the cache's manifest, the layers and N to its own config."""
    config_fields: tuple[str, ...]
    """The fields of that config which Qwen3's has not: engines read them."""
    declared: Mapping[str, Any]
    """Facts that an exported config states for engines, the same for every draft of this kind."""
    describe: Callable[[PretrainedConfig], list[str]]
    """Facts of a draft for its model card, a line each in Markdown."""
    weight_fields: Callable[[Mapping[str, Any]], dict[str, Any]]
    """Of a config's values those that decide what weights mean, though their shapes may be the same."""
    check_released: Callable[[Mapping[str, Any], str], None]
    """Check a released config.json. Raises RunError where this project has no such draft."""
    released_settings: Callable[
        [Mapping[str, Any], Mapping[str, Tensor], str], tuple[dict[str, Any], dict[str, Any]]
    ]
    """From a released config and weights to `[draft]`, and to the config with its defaults."""
    build: Callable[[PretrainedConfig], Any]
    """A draft in fp32 with random weights."""
    initialise: Callable[[Any, DraftConfig, CacheReader, np.ndarray], None]
    """Set the first weights that are learned from training samples, on the draft's device."""
    module: Callable[[Any, Objective], TrainerModule]
    attention: Callable[[str, PretrainedConfig, torch.device], str]
    """The kernel that a setting of `draft.attention` stands for. Raises ConfigError where there is none."""
    collate: Callable[[AnchorChoice], Collate]
    """From a choice of positions to the tensors that the kind adds to a pack."""
    decoder: Callable[[Any], Decoder]
    flops: Callable[[PretrainedConfig, Pack], float]
    """Operations of a forward and a backward over a pack."""
    lr_scales: Callable[[TrainConfig], Mapping[str, float]]
    """Multiples of the learning rate by the prefix of parameters' names; all others have 1."""
    rules: Mapping[str, tuple[Rule, ...]]
    """What each engine asks of such a draft, by the names that `dspark export --to` takes."""

    def on(
        self, model: nn.Module, config: RunConfig, device: torch.device, *, by_layer: bool = False
    ) -> TrainerModule:
        """Return a draft, which is on the device, with a run's objective, ready to run there."""
        module = self.module(model, Objective.of(config.loss))
        module.prepare(config, device, by_layer=by_layer)
        return module
