"""Check a cache and a config, and build the draft to train. All checks come before any building."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel

from pipeline.cache import CacheReader
from pipeline.cache.split import few_steps, more_steps
from pipeline.errors import ConfigError
from pipeline.process import torchrun_place
from pipeline.remote.address import Place
from train.config import RunConfig, TrainConfig
from train.data.packing import count_steps, epoch_packs
from train.data.reads import Reads, available_memory, check_reads, used_bytes
from train.data.split import split
from train.data.store import open_cache, shuffled_shards
from train.draft import DRAFTS
from train.draft.kind import DraftKind
from train.draft.shape import draft_shape, resolved
from train.draft.vocabulary import count_labels, most_frequent
from train.losses.fused import resolve_kernel
from train.runs.checkpoint import load_weights
from train.runs.weights import check_warm_start, warm_start
from train.runtime.console import say
from train.runtime.trackers import check_trackers
from train.trainer.optimizer import check_optimizer


@dataclass(frozen=True)
class Setup:
    """A checked run. Nothing is loaded or written yet."""

    reader: CacheReader
    config: RunConfig
    """Resolved config, with the settings that depend on the cache filled in."""
    kind: DraftKind
    shape: PretrainedConfig
    """The draft's Hugging Face config."""
    samples: np.ndarray
    """Sample numbers to train on."""
    held_out: np.ndarray
    """Sample numbers to evaluate on."""

    @property
    def order(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Lengths, shards and numbers of the training samples, `[n]` each: they decide the data order."""
        return self.reader.lengths[self.samples], self.reader.shards[self.samples], self.samples

    def reads(self, say: Callable[[str], object]) -> Reads:
        """Return what decides how batches are read, and says so."""
        layers = tuple(self.shape.target_layer_ids)
        used = used_bytes(self.reader, self.samples, layers)
        return Reads(self.reader, self.config.train.reader, layers, used, available_memory(), say)


def set_up(
    cache: Place, config: RunConfig, device: torch.device, world: int = 1, *, begins: bool = True
) -> Setup:
    """Read a cache's index and check a config against it.

    Args:
        device: device to train on.
        world: world size.
        begins: the run starts from its initial weights instead of from a checkpoint.

    Raises:
        DSparkError: there is no such cache, or the config fits neither it nor any draft.
    """
    check_trackers(config.train.report_to)
    check_optimizer(config.train)
    reader = open_cache(cache, config.train)
    reader.check_shards()
    shape = draft_shape(reader, config)
    reader.only(shape.target_layer_ids)
    check_reads(reader, config.train.reader)
    kind = DRAFTS[config.draft.kind]
    if kind.needs_last_hidden(config):
        reader.require_last_hidden(f"draft.kind = {kind.name}")
    kind.attention(config.draft, shape, device)
    resolve_kernel(config.loss.kernel, device, frozen=not getattr(config.draft, "train_head", False))
    if begins and config.draft.init_from is not None:
        check_warm_start(kind, shape, Path(config.draft.init_from))
    samples, held_out = split(reader, config.train.held_out, config.train.data_share)
    check_lengths(reader, config.train.batch_tokens)
    if kind.anchors is not None:
        check_anchors(reader, samples, config.train)
    check_world(config.train, world)
    reader.alone(held_out)
    train = replace(config.train, shuffle_shards=shuffled_shards(reader, config.train))
    config = replace(config, draft=resolved(config.draft, shape), train=train)
    return Setup(reader, config, kind, shape, samples, held_out)


def check_lengths(reader: CacheReader, batch_tokens: int) -> None:
    """Check that every sample fits a batch. Raise ConfigError with the smallest value that fits."""
    longest = int(reader.lengths.max())
    if longest > batch_tokens:
        raise ConfigError(
            f"train.batch_tokens = {batch_tokens} is less than the cache's longest sample, {longest} tokens: "
            f"set it to at least {longest}"
        )


def check_anchors(reader: CacheReader, samples: np.ndarray, config: TrainConfig) -> None:
    """Check that a batch can have the config's number of anchors. Raise ConfigError with the limit."""
    most = most_candidates(reader.lengths[samples], reader.candidates[samples], config.batch_tokens)
    if config.anchors_per_batch > most:
        raise ConfigError(
            f"train.anchors_per_batch = {config.anchors_per_batch} is more than any batch of "
            f"{config.batch_tokens} tokens of this cache can have: set it to at most {most}"
        )


def most_candidates(lengths: np.ndarray, candidates: np.ndarray, batch_tokens: int) -> int:
    """Return an upper bound on a batch's candidates: the densest samples first, the last one in part."""
    order = np.argsort(-candidates / lengths, kind="stable")
    ends = np.cumsum(lengths[order])
    full = int(np.searchsorted(ends, batch_tokens, side="right"))
    most = float(candidates[order[:full]].sum())
    if full < len(order):
        last = order[full]
        room = batch_tokens - (ends[full - 1] if full else 0)
        most += candidates[last] * room / lengths[last]
    return int(most)


def check_world(config: TrainConfig, world: int) -> None:
    """Check that every rank gets a micro-batch. Raise ConfigError if not."""
    if world > config.micro_batches_per_step:
        raise ConfigError(
            f"train.micro_batches_per_step = {config.micro_batches_per_step} leaves some of {world} "
            f"processes without work: set it to {world} or a multiple of it, or start fewer processes"
        )


def count_run_steps(setup: Setup) -> int:
    """Return the number of optimiser steps of the whole run."""
    lengths, shards, _ = setup.order
    return count_steps(lengths, shards, setup.config.train)


def steps_lines(setup: Setup, total: int) -> Iterator[str]:
    """Yield the number of a run's optimiser steps with its reason, and a warning if they are few.

    Args:
        total: optimiser steps of the whole run.
    """
    train, (lengths, shards, _) = setup.config.train, setup.order
    shape = (train.batch_tokens, train.seed, 0)
    packs = len(epoch_packs(lengths, *shape, shards, train.shuffle_shards))
    each = -(-packs // train.micro_batches_per_step)
    epoch = (
        f"an epoch is {each:,} step{'s' * (each != 1)}, {packs:,} batches of at most {train.batch_tokens:,} "
        f"tokens, {train.micro_batches_per_step:,} per step"
    )
    why = f"train.epochs = {train.epochs}" if train.max_steps is None else "train.max_steps"
    yield f"{total:,} optimiser steps by {why}; {epoch}"
    remedy = "raise train.max_steps"
    if train.max_steps is None:
        remedy = more_steps(packs * train.epochs, train.micro_batches_per_step)
    warning = few_steps(total, remedy)
    if warning:
        yield f"warning: {warning}"


def build_draft(setup: Setup, checkpoint: Path | None = None) -> PreTrainedModel:
    """Build a run's draft in fp32 with the target's embedding and head, frozen unless the kind trains them.

    Args:
        checkpoint: folder that its weights come from. Without one they are those of `draft.init_from`, if
            set, or else random; a reduced vocabulary is then chosen by the training samples.
    """
    config = setup.config
    torch.manual_seed(config.train.seed)
    model = setup.kind.build(setup.shape)
    load: Callable[[], None] | None = None
    if checkpoint is not None:
        load = partial(load_weights, model, checkpoint)
    elif config.draft.init_from is not None:
        load = partial(warm_start, model, setup.kind, Path(config.draft.init_from))
    elif model.reduced:
        counts = count_labels(setup.reader, setup.samples)
        tokens = most_frequent(counts, len(model.kept))
        model.keep(torch.from_numpy(tokens))
        if torchrun_place().rank == 0:
            say(
                f"the draft has {len(tokens):,} of the target's {len(counts):,} tokens, which are "
                f"{100 * counts[tokens].sum() / max(1, counts.sum()):.2f}% of the supervised ones"
            )
    frozen = setup.reader.frozen()
    given = {"embed_tokens": frozen["embed_tokens.weight"], "lm_head": frozen["lm_head.weight"]}
    model.initialize_embeddings_and_head(**given)
    if load is not None:
        load()
        if model.reduced:  # now it is known which rows of the head are the draft's
            model.initialize_embeddings_and_head(**given)
            load()
    return model
