"""The training loop: cache in, draft out."""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pipeline import config as configuration
from pipeline.cache import CacheReader
from pipeline.device import resolve_device, reuse_freed_memory
from pipeline.errors import RunError
from train.batches import AnchorChoice, Batch, load_batch, load_blocks, prefetch, random_anchors
from train.checkpoint import save_checkpoint
from train.config import RunConfig
from train.draft.config import draft_config, read_target_config
from train.draft.model import Qwen3DSparkModel
from train.evaluate import evaluate, split
from train.losses import LossSums, divide
from train.module import DSparkTrainerModule
from train.optim import build_optimizer, learning_rate
from train.order import epoch_batches
from train.precision import autocast

METRICS = "metrics.jsonl"
CONFIG = "config.toml"
EVALUATION = "evaluation.json"


def count_steps(num_samples: int, config: RunConfig) -> int:
    """Optimiser steps of a run. An epoch's last step may hold fewer micro-batches than the others."""
    batches = -(-num_samples // config.train.batch_size)
    steps = -(-batches // config.train.gradient_accumulation_steps)
    return config.train.max_steps or config.train.epochs * steps


def build_draft(reader: CacheReader, config: RunConfig) -> Qwen3DSparkModel:
    """A fresh draft for a cache: seeded weights, the target's embedding and head copied in and frozen.

    Raises:
        CacheError: the config asks for a layer that the cache lacks.
        ConfigError: a combination no draft can have.
    """
    layer_ids = reader.require_layers(config.draft.target_layer_ids or reader.layer_ids)
    target = read_target_config(reader.path / "target")
    torch.manual_seed(config.train.seed)
    model = Qwen3DSparkModel(draft_config(config.draft, target, reader.manifest, layer_ids)).float()
    frozen = reader.frozen()
    model.initialize_embeddings_and_head(
        embed_tokens=frozen["embed_tokens.weight"], lm_head=frozen["lm_head.weight"]
    )
    return model


def trainer_module(model: Qwen3DSparkModel, config: RunConfig) -> DSparkTrainerModule:
    """The draft with the objective its run asks for."""
    loss = config.loss
    return DSparkTrainerModule(model, loss.decay_gamma, loss.ce_alpha, loss.l1_alpha, loss.confidence_alpha)


def open_run(run: Path, config: RunConfig, *, fresh: bool) -> None:
    """Make a run's directory and save its config. Raises RunError when it is taken."""
    if run.exists() and any(run.iterdir()):
        if not fresh:
            raise RunError(f"{run} is not empty: choose another --run, or pass --fresh to start it over")
        if not (run / CONFIG).is_file():
            raise RunError(f"{run} is not empty and is no run (it has no {CONFIG}): choose another --run")
        shutil.rmtree(run)
    run.mkdir(parents=True, exist_ok=True)
    (run / CONFIG).write_text(configuration.to_toml(config), encoding="utf-8")


def load_run_config(run: Path) -> RunConfig:
    """The config a run was started with. Raises RunError when there is no run."""
    if not (run / CONFIG).is_file():
        raise RunError(f"no run at {run}: expected {run / CONFIG}; run `dspark train --run {run}` first")
    return configuration.build(RunConfig, configuration.load_toml(run / CONFIG), str(run / CONFIG))


def _optimizer_steps(
    reader: CacheReader, samples: np.ndarray, config: RunConfig, layer_ids: tuple[int, ...], total_steps: int
) -> Iterator[tuple[Tensor, Iterator[Batch]]]:
    """For every optimiser step, its denominator and its micro-batches, read ahead one by one.

    The denominator needs only masks and anchors, so a step's features are never held together.
    """
    lengths, train = reader.lengths[samples], config.train

    def plan() -> Iterator[list[tuple[list[int], AnchorChoice]]]:
        for epoch in itertools.count():
            choose = random_anchors(config.draft.num_anchors, train.seed, epoch)
            batches = epoch_batches(lengths, train.batch_size, train.seed, epoch)
            for start in range(0, len(batches), train.gradient_accumulation_steps):
                members = batches[start : start + train.gradient_accumulation_steps]
                yield [(samples[m].tolist(), choose) for m in members]

    def job(members: list[int], choose: AnchorChoice) -> Callable[[], Batch]:
        return lambda: load_batch(reader, members, layer_ids, choose)

    def steps() -> Iterator[list[tuple[list[int], AnchorChoice]]]:
        return itertools.islice(plan(), total_steps)

    loaded = prefetch(job(*micro_batch) for step in steps() for micro_batch in step)
    shape = (config.draft.block_size, config.loss.decay_gamma)
    for step in steps():
        weights = [load_blocks(reader, members, choose).weight(*shape) for members, choose in step]
        yield torch.stack(weights).sum(), itertools.islice(loaded, len(step))


class _Window:
    """Sums since the last log line; divided once, when the line is written."""

    def __init__(self) -> None:
        self.sums: LossSums | None = None
        self.tokens = 0
        self.start = time.perf_counter()

    def add(self, sums: LossSums, tokens: int) -> None:
        self.sums = sums if self.sums is None else self.sums + sums
        self.tokens += tokens

    def line(self, step: int, lr: float, config: RunConfig) -> dict[str, Any]:
        assert self.sums is not None
        loss = config.loss
        metrics = divide(self.sums, loss.ce_alpha, loss.l1_alpha, loss.confidence_alpha)
        values = {
            "step": step,
            "loss": metrics.loss.item(),
            "ce_loss": metrics.ce_loss.item(),
            "l1_loss": metrics.l1_loss.item(),
            "confidence_loss": metrics.confidence_loss.item(),
            "accept_rate": metrics.accept_rate.item(),
            "tau": metrics.tau.item(),
            "lr": lr,
        }
        # After .item(), so that the device has finished what is being timed.
        values["tokens_per_s"] = self.tokens / (time.perf_counter() - self.start)
        return values


def train(
    cache: Path, config: RunConfig, run: Path, *, device: str = "auto", fresh: bool = False
) -> dict[str, Any]:
    """Train a draft from a cache and return its held-out evaluation.

    Writes to `run`: `config.toml`, `metrics.jsonl` (a JSON object a logged step), `checkpoints/step-N`,
    `latest` and `evaluation.json`. The target is never loaded.

    Raises:
        DSparkError: see `pipeline.errors`.
    """
    place = resolve_device(device)
    if place.type == "cpu":
        reuse_freed_memory()
    reader = CacheReader(cache)
    reader.check_shards()
    train_samples, test_samples = split(reader, config.train.held_out)
    model = build_draft(reader, config).to(place)
    open_run(run, config, fresh=fresh)
    module = trainer_module(model, config)
    optimizer = build_optimizer(model, config.train)
    total_steps = count_steps(len(train_samples), config)
    target = reader.manifest.identity.target
    state = {"target_name": target.name, "target_weights": target.weights}

    def held_out_figures(step: int) -> dict[str, Any]:
        result = {"step": step, **evaluate(module, reader, test_samples, config, place)}
        _append(run / METRICS, {"step": step, "held_out": result})
        return result

    layer_ids = tuple(model.config.target_layer_ids)
    steps = _optimizer_steps(reader, train_samples, config, layer_ids, total_steps)
    window = _Window()
    result: dict[str, Any] = {}
    progress = tqdm(steps, total=total_steps, unit="step", desc="train")
    for step, (denominator, batches) in enumerate(progress, start=1):
        lr = learning_rate(step - 1, total_steps, config.train)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        for batch in batches:
            with autocast(place, config.train.precision):
                metrics = module(**batch.to(place).arguments(), denominator=denominator.to(place))
            metrics.loss.backward()
            window.add(metrics.sums.detach(), _num_tokens(batch))
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.max_grad_norm)
        if not torch.isfinite(norm):
            raise RunError(f"step {step}: the gradient is not finite; lower train.lr, or look at the data")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % config.train.log_every == 0 or step == total_steps:
            line = window.line(step, lr, config)
            _append(run / METRICS, line)
            progress.set_postfix(
                loss=f"{line['loss']:.3f}", tau=f"{line['tau']:.3f}", tok_s=f"{line['tokens_per_s']:.0f}"
            )
            window = _Window()
        last = step == total_steps
        if last or (config.train.checkpoint_every and step % config.train.checkpoint_every == 0):
            save_checkpoint(run, step, model, state)
        if len(test_samples) and (last or (config.train.eval_every and step % config.train.eval_every == 0)):
            started = time.perf_counter()
            result = held_out_figures(step)
            progress.write(f"step {step}: held-out tau {result['tau']:.3f}, loss {result['loss']:.4f}")
            window.start += time.perf_counter() - started  # not training time
    if result:
        (run / EVALUATION).write_text(json.dumps(result, indent=1) + "\n")
    return result


def _num_tokens(batch: Batch) -> int:
    """Tokens up to each row's last supervised one, where every sample ends: padding is not counted."""
    positions = torch.arange(1, batch.loss_mask.shape[1] + 1)
    return int((positions * (batch.loss_mask > 0)).amax(dim=1).sum())


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
