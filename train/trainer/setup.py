"""From a cache and a config to what is trained: everything is checked before anything is built."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3Config

from pipeline.cache import CacheReader
from pipeline.errors import ConfigError
from train.config import DraftConfig, RunConfig, TrainConfig
from train.draft.dspark.attention import resolve_attention
from train.draft.dspark.config import draft_config, read_target_config
from train.draft.dspark.model import Qwen3DSparkModel
from train.draft.dspark.module import DSparkTrainerModule
from train.draft.dspark.ridge import ridge_initialise
from train.eval.validate import split
from train.runs.weights import check_warm_start, warm_start
from train.runtime.precision import allow_tf32, resolve_precision
from train.runtime.trackers import check_trackers
from train.trainer.optimizer import check_optimizer


@dataclass(frozen=True)
class Setup:
    """A run that could begin: nothing is loaded yet and nothing written."""

    reader: CacheReader
    config: RunConfig
    """Resolved: what depends on the cache is filled in."""
    shape: Qwen3Config
    """The draft's."""
    samples: np.ndarray
    """Sample numbers to train on."""
    held_out: np.ndarray
    """Sample numbers to evaluate on."""


def set_up(
    cache: Path, config: RunConfig, device: torch.device, world: int = 1, *, begins: bool = True
) -> Setup:
    """Read a cache's index and check a config against it.

    Args:
        device: what will be trained on.
        world: the number of ranks.
        begins: whether first weights are needed; a run that goes on has its own.

    Raises:
        DSparkError: there is no such cache, or the config asks for what it lacks or no draft can have.
    """
    check_trackers(config.train.report_to)
    check_optimizer(config.train)
    reader = CacheReader(cache)
    reader.check_shards()
    shape = draft_shape(reader, config)
    resolve_attention(config.draft.attention, shape, device)
    if begins and config.draft.init_from is not None:
        check_warm_start(shape, Path(config.draft.init_from))
    samples, held_out = split(reader, config.train.held_out)
    check_lengths(reader, config.train.batch_tokens)
    check_anchors(reader, samples, config.train)
    check_world(config.train, world)
    return Setup(reader, replace(config, draft=resolved(config.draft, shape)), shape, samples, held_out)


def draft_shape(reader: CacheReader, config: RunConfig) -> Qwen3Config:
    """The Hugging Face config of a run's draft.

    Raises:
        CacheError: the config asks for a layer that the cache lacks.
        ConfigError: a combination no draft can have.
    """
    layer_ids = reader.require_layers(config.draft.target_layer_ids or reader.layer_ids)
    target = read_target_config(reader.path / "target")
    return draft_config(config.draft, target, reader.manifest, layer_ids, config.train.anchors_per_batch)


def resolved(draft: DraftConfig, shape: Qwen3Config) -> DraftConfig:
    """The `[draft]` table with everything filled in that the cache and its target decide."""
    same = ("mask_token_id", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")
    values = {name: getattr(shape, name) for name in same}
    return replace(draft, target_layer_ids=tuple(shape.target_layer_ids), **values)


def check_lengths(reader: CacheReader, batch_tokens: int) -> None:
    """Every sample fits a batch. Raises ConfigError naming what would be enough."""
    longest = int(reader.lengths.max())
    if longest > batch_tokens:
        raise ConfigError(
            f"train.batch_tokens = {batch_tokens} is less than the cache's longest sample, {longest} tokens: "
            f"set it to at least {longest}"
        )


def check_anchors(reader: CacheReader, samples: np.ndarray, config: TrainConfig) -> None:
    """Some batch could have as many anchors as are asked for. Raises ConfigError naming how many."""
    most = most_candidates(reader.lengths[samples], reader.candidates[samples], config.batch_tokens)
    if config.anchors_per_batch > most:
        raise ConfigError(
            f"train.anchors_per_batch = {config.anchors_per_batch} is more than any batch of "
            f"{config.batch_tokens} tokens of this cache can have: set it to at most {most}"
        )


def most_candidates(lengths: np.ndarray, candidates: np.ndarray, batch_tokens: int) -> int:
    """No batch has more candidates than this: the densest samples first, the last one in part."""
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
    """Every rank has something to do. Raises ConfigError."""
    if world > config.micro_batches_per_step:
        raise ConfigError(
            f"train.micro_batches_per_step = {config.micro_batches_per_step} leaves some of {world} "
            f"processes without work: set it to at least {world}, better a multiple of it, or start fewer"
        )


def build_draft(setup: Setup, *, fresh: bool = True) -> Qwen3DSparkModel:
    """A run's draft in fp32 with the target's embedding and head, frozen.

    Args:
        fresh: give it its first weights; without that they are random, to be loaded over.
    """
    config = setup.config
    torch.manual_seed(config.train.seed)
    model = Qwen3DSparkModel(setup.shape).float()
    frozen = setup.reader.frozen()
    model.initialize_embeddings_and_head(
        embed_tokens=frozen["embed_tokens.weight"], lm_head=frozen["lm_head.weight"]
    )
    if fresh and config.draft.init_from is not None:
        warm_start(model, Path(config.draft.init_from))
    return model


def initialise(model: Qwen3DSparkModel, setup: Setup) -> None:
    """What of a fresh draft's first weights is learned from the cache, on the draft's device."""
    if setup.config.draft.init == "ridge":
        ridge_initialise(model, setup.reader, setup.samples)


def trainer_module(model: Qwen3DSparkModel, config: RunConfig) -> DSparkTrainerModule:
    """The draft with the objective its run asks for."""
    loss = config.loss
    return DSparkTrainerModule(model, loss.decay_gamma, loss.ce_alpha, loss.l1_alpha, loss.confidence_alpha)


def prepare(
    module: DSparkTrainerModule, config: RunConfig, device: torch.device, *, by_layer: bool = False
) -> None:
    """Set how the draft runs on a device: attention kernel, compilation, checkpointing.

    Args:
        by_layer: compile layer by layer, as sharded ones need it.
    """
    model, train = module.draft_model, config.train
    allow_tf32(train.tf32)
    model.attention = resolve_attention(config.draft.attention, model.config, device)
    model.activation_checkpointing = train.activation_checkpointing
    if resolve_precision(device, train.precision) == "bf16" and not model.lm_head.weight.requires_grad:
        model.lm_head.to(torch.bfloat16)  # as its products take it: no copy a step
    if train.compile == "on" or (train.compile == "auto" and device.type == "cuda"):
        module.compile_loss = True
        # Under DDP it would split graphs between its buckets, which it can't do where flex_attention is.
        torch._dynamo.config.optimize_ddp = False
        if by_layer:
            for layer in model.layers:
                layer.compile()
        else:
            model.backbone = torch.compile(model.backbone)
