"""Held-out figures during training: sums only, over a few anchors per sample, by all ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from pipeline.cache import CacheReader
from pipeline.errors import ConfigError
from train.config import RunConfig
from train.data.loader import Batch, loaded
from train.data.packing import sequential_packs, share
from train.data.sampling import AnchorChoice, spread_anchors
from train.draft import DRAFTS
from train.draft.kind import TrainerModule
from train.losses.slots import TITLES, LossSums, Objective, divide, to_numbers
from train.runtime.compiled import compiles
from train.runtime.console import bar
from train.runtime.distributed import Ranks
from train.runtime.precision import autocast

# Training samples on which a draft shows that it is finite, where nothing was held out.
_FEW = 8
# Figures of `StepMetrics.values` that need no teacher.
_OF_THE_DATA = ("loss", "ce_loss")


def teacherless(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Return figures of a cache without last hidden states: None for each that needs the target's."""
    return {name: value if name in _OF_THE_DATA else None for name, value in figures.items()}


def held_out_batches(
    module: TrainerModule,
    reader: CacheReader,
    samples: Sequence[int] | np.ndarray,
    config: RunConfig,
    ranks: Ranks,
    choose: AnchorChoice,
    title: str,
) -> tuple[list[np.ndarray], Iterable[Batch]]:
    """Return a rank's share of held-out samples: packs of sample numbers, and batches with a progress bar.

    Raises:
        ConfigError: there are no samples.
    """
    samples = np.asarray(samples)
    if not len(samples):
        raise ConfigError("nothing was held out (train.held_out = 0), so there is nothing to evaluate on")
    size = max(config.train.batch_tokens, int(reader.lengths[samples].max()))  # of a cache of longer samples
    own = share(sequential_packs(reader.lengths[samples], size), ranks.rank, ranks.world)
    packs = [samples[members] for members in own]
    layer_ids = tuple(module.draft_model.config.target_layer_ids)
    kind = DRAFTS[config.draft.kind]
    blocks = kind.least_blocks(config.draft) if compiles(config.train.compile, ranks.device) else 0
    collate = kind.collate(choose, blocks)
    chosen = [(members.tolist(), collate) for members in packs]
    batches = loaded(reader, chosen, layer_ids, size, ranks.device)
    return packs, bar(batches, ranks, total=len(packs), unit="batch", desc=title, leave=False)


@torch.no_grad()
def validate(
    module: TrainerModule,
    reader: CacheReader,
    samples: Sequence[int] | np.ndarray,
    config: RunConfig,
    ranks: Ranks,
    interrupted: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """Return loss terms, acceptance by position and tau over `samples`, the same on every rank.

    From a cache without last hidden states all but the loss and the cross entropy are None.

    Anchors are evenly spread over each sample's candidates, so the figures are the same every time.

    Args:
        ranks: share the samples.
        interrupted: asked before every batch, by all ranks at once; None is returned when it says so.
    """
    spread = spread_anchors(config.train.eval_anchors)
    _, batches = held_out_batches(module, reader, samples, config, ranks, spread, "evaluate")
    was_training = module.training
    module.eval()
    total: LossSums | None = None
    for batch in batches:
        if interrupted():
            module.train(was_training)
            return None
        with autocast(ranks.device, config.train.precision):
            sums = module(**batch.tensors()).sums
        total = sums if total is None else total + sums
    module.train(was_training)
    assert total is not None
    total = LossSums.from_tensors(list(total.terms), ranks.total(total.tensors()))
    figures = divide(total, Objective.of(config.loss)).values()
    found = to_numbers(figures | {"blocks": total.blocks})
    blocks = int(found.pop("blocks"))
    if not reader.has_last_hidden:
        found = teacherless(found)
    return {"samples": len(samples), "blocks": blocks, **found}


def headline(result: Mapping[str, Any]) -> str:
    """Return the figure by which drafts are compared, with its name."""
    if result["tau"] is None:
        return f"held-out cross entropy {result['ce_loss']:.4f}"
    return f"held-out tau {result['tau']:.3f}"


def gives_finite_losses(
    module: TrainerModule, reader: CacheReader, samples: np.ndarray, config: RunConfig, ranks: Ranks
) -> bool:
    """Return whether a draft has a finite loss on most of a few samples, each by itself.

    All ranks must call this. One bad sample says nothing about the draft.

    Args:
        samples: sample numbers to choose from.
    """
    chosen = samples[np.unique(np.linspace(0, len(samples) - 1, _FEW).astype(int))]
    found = [validate(module, reader, [sample], config, ranks) for sample in chosen]
    losses = [figures["loss"] for figures in found if figures is not None and figures["blocks"]]
    return 2 * sum(map(math.isfinite, losses)) > len(losses)


def format_validation(result: dict[str, Any]) -> str:
    """Format the figures for a terminal."""
    over = f"{headline(result)} over {result['blocks']:,} blocks of {result['samples']:,} samples"
    if result["tau"] is None:
        return f"{over} (the cache has no last hidden states to tell the acceptance)"
    values = {"loss": result["loss"]}
    values |= {title: result.get(f"{name}_loss") for name, title in TITLES.items()}
    terms = ", ".join(f"{title} {value:.4f}" for title, value in values.items() if value is not None)
    positions = "  ".join(f"{k + 1}: {a:.3f}" for k, a in enumerate(result["accept_by_position"]))
    return f"{over}\n  acceptance by position   {positions}\n  {terms}"
