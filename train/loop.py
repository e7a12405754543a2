"""The training loop: cache in, draft out."""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pipeline import config as configuration
from pipeline.cache import CacheReader
from pipeline.device import resolve_device, reuse_freed_memory
from pipeline.errors import ConfigError, RunError
from train.batches import AnchorChoice, loaded, random_anchors
from train.checkpoint import save_checkpoint
from train.config import RunConfig, TrainConfig
from train.draft.attention import resolve_attention
from train.draft.config import draft_config, read_target_config
from train.draft.model import Qwen3DSparkModel
from train.evaluate import evaluate, split
from train.flops import peak_flops, training_flops
from train.initialise import ridge_initialise
from train.module import DSparkTrainerModule
from train.optim import build_optimizer, learning_rate, normalise_gradients
from train.order import epoch_steps
from train.precision import allow_tf32, autocast, resolve_precision
from train.profile import step_profiler
from train.window import Window

METRICS = "metrics.jsonl"
CONFIG = "config.toml"
EVALUATION = "evaluation.json"
TRACE = "trace.json"


def _steps_of(lengths: np.ndarray, config: TrainConfig, epoch: int) -> list[list[np.ndarray]]:
    return epoch_steps(lengths, config.batch_tokens, config.gradient_accumulation_steps, config.seed, epoch)


def count_steps(lengths: np.ndarray, config: TrainConfig) -> int:
    """Optimiser steps of a run over samples of these lengths `[n]`."""
    return config.max_steps or sum(len(_steps_of(lengths, config, epoch)) for epoch in range(config.epochs))


def check_lengths(reader: CacheReader, batch_tokens: int) -> None:
    """Every sample fits a batch. Raises ConfigError naming what would be enough."""
    longest = int(reader.lengths.max())
    if longest > batch_tokens:
        raise ConfigError(
            f"train.batch_tokens = {batch_tokens} is less than the cache's longest sample, {longest} tokens: "
            f"set it to at least {longest}"
        )


def build_draft(reader: CacheReader, config: RunConfig) -> Qwen3DSparkModel:
    """A fresh draft for a cache: seeded weights, the target's embedding and head copied in and frozen.

    Raises:
        CacheError: the config asks for a layer that the cache lacks.
        ConfigError: a combination no draft can have.
    """
    layer_ids = reader.require_layers(config.draft.target_layer_ids or reader.layer_ids)
    target = read_target_config(reader.path / "target")
    torch.manual_seed(config.train.seed)
    shape = draft_config(config.draft, target, reader.manifest, layer_ids, config.train.anchors_per_batch)
    model = Qwen3DSparkModel(shape).float()
    frozen = reader.frozen()
    model.initialize_embeddings_and_head(
        embed_tokens=frozen["embed_tokens.weight"], lm_head=frozen["lm_head.weight"]
    )
    return model


def trainer_module(model: Qwen3DSparkModel, config: RunConfig) -> DSparkTrainerModule:
    """The draft with the objective its run asks for."""
    loss = config.loss
    return DSparkTrainerModule(model, loss.decay_gamma, loss.ce_alpha, loss.l1_alpha, loss.confidence_alpha)


def check_run(run: Path, *, fresh: bool) -> None:
    """Raises RunError when a run's directory is taken."""
    if run.exists() and any(run.iterdir()):
        if not fresh:
            raise RunError(f"{run} is not empty: choose another --run, or pass --fresh to start it over")
        if not (run / CONFIG).is_file():
            raise RunError(f"{run} is not empty and is no run (it has no {CONFIG}): choose another --run")


def open_run(run: Path, config: RunConfig, *, fresh: bool) -> None:
    """Make a run's directory and save its config. Raises RunError when it is taken."""
    check_run(run, fresh=fresh)
    if run.exists():
        shutil.rmtree(run)
    run.mkdir(parents=True, exist_ok=True)
    (run / CONFIG).write_text(configuration.to_toml(config), encoding="utf-8")


def load_run_config(run: Path) -> RunConfig:
    """The config a run was started with. Raises RunError when there is no run."""
    if not (run / CONFIG).is_file():
        raise RunError(f"no run at {run}: expected {run / CONFIG}; run `dspark train --run {run}` first")
    return configuration.build(RunConfig, configuration.load_toml(run / CONFIG), str(run / CONFIG))


def prepare(module: DSparkTrainerModule, config: RunConfig, device: torch.device) -> None:
    """Set how the draft runs on a device: attention kernel, compilation, checkpointing."""
    model, train = module.draft_model, config.train
    allow_tf32(train.tf32)
    model.attention = resolve_attention(config.draft.attention, model.config, device)
    model.activation_checkpointing = train.activation_checkpointing
    if resolve_precision(device, train.precision) == "bf16" and not model.lm_head.weight.requires_grad:
        model.lm_head.to(torch.bfloat16)  # as its products take it: no copy a step
    if train.compile == "on" or (train.compile == "auto" and device.type == "cuda"):
        model.backbone = torch.compile(model.backbone)
        module.compile_loss = True


def _packs(
    lengths: np.ndarray, samples: np.ndarray, config: TrainConfig, total_steps: int
) -> Iterator[list[tuple[list[int], AnchorChoice]]]:
    """For every optimiser step, the samples of its micro-batches and the choice of their anchors."""

    def endless() -> Iterator[list[tuple[list[int], AnchorChoice]]]:
        for epoch in itertools.count():
            choose = random_anchors(config.anchors_per_batch, config.seed, epoch)
            for step in _steps_of(lengths, config, epoch):
                yield [(samples[members].tolist(), choose) for members in step]

    return itertools.islice(endless(), total_steps)


def train(
    cache: Path,
    config: RunConfig,
    run: Path,
    *,
    device: str = "auto",
    fresh: bool = False,
    profile_steps: int = 0,
) -> dict[str, Any]:
    """Train a draft from a cache and return its held-out evaluation.

    Writes to `run`: `config.toml`, `metrics.jsonl` (a JSON object a logged step), `checkpoints/step-N`,
    `latest` and `evaluation.json`. The target is never loaded.

    Args:
        profile_steps: write a Chrome trace of so many steps, the first few left out, to `trace.json`.

    Raises:
        DSparkError: see `pipeline.errors`.
    """
    place = resolve_device(device)
    if place.type == "cpu":
        reuse_freed_memory()
    reader = CacheReader(cache)
    reader.check_shards()
    train_samples, test_samples = split(reader, config.train.held_out)
    check_lengths(reader, config.train.batch_tokens)
    lengths = reader.lengths[train_samples]
    total_steps = count_steps(lengths, config.train)
    check_run(run, fresh=fresh)
    profiler = step_profiler(profile_steps, total_steps, run / TRACE)
    model = build_draft(reader, config).to(place)
    if config.draft.init == "ridge":
        ridge_initialise(model, reader, train_samples)
    module = trainer_module(model, config)
    prepare(module, config, place)
    open_run(run, config, fresh=fresh)
    optimizer = build_optimizer(model, config.train)
    target = reader.manifest.identity.target
    state = {"target_name": target.name, "target_weights": target.weights}

    def held_out_figures(step: int) -> dict[str, Any]:
        result = {"step": step, **evaluate(module, reader, test_samples, config, place)}
        _append(run / METRICS, {"step": step, "held_out": result})
        return result

    steps = _packs(lengths, train_samples, config.train, total_steps)
    steps, ahead = itertools.tee(steps)
    batches = loaded(
        reader,
        itertools.chain.from_iterable(ahead),
        tuple(model.config.target_layer_ids),
        config.train.batch_tokens,
        place,
        partial(training_flops, model.config),
    )
    precision = resolve_precision(place, config.train.precision)
    window = Window(config.loss, place, peak_flops(place, precision, config.train.tf32))
    result: dict[str, Any] = {}
    norm: Tensor | None = None
    one = torch.ones((), device=place)
    progress = tqdm(steps, total=total_steps, unit="step", desc="train")
    for step, packs in enumerate(progress, start=1):
        lr = learning_rate(step - 1, total_steps, config.train)
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        weight = torch.zeros((), device=place)
        for _ in packs:
            started = time.perf_counter()
            batch = next(batches)
            window.waited(time.perf_counter() - started)
            with autocast(place, precision):
                metrics = module(**batch.tensors(), denominator=one)
            metrics.loss.backward()
            weight += metrics.sums.weight
            window.add(metrics.sums, batch)
        check_norm(norm, step - 1)  # a step late, so that a GPU has work while this waits
        norm = normalise_gradients(model, weight, config.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        profiler.step()
        last = step == total_steps
        logs = step % config.train.log_every == 0 or last
        saves = last or (config.train.checkpoint_every and step % config.train.checkpoint_every == 0)
        evaluates = len(test_samples) and (
            last or (config.train.eval_every and step % config.train.eval_every == 0)
        )
        if logs or saves or evaluates:
            check_norm(norm, step)
        if logs:
            line = window.line(step, lr)
            _append(run / METRICS, line)
            progress.set_postfix(
                loss=f"{line['loss']:.3f}",
                tau=f"{line['tau']:.3f}",
                tok_s=f"{line['tokens_per_s']:.0f}",
                wait=f"{line['data_wait_percent']:.0f}%",
            )
        started = time.perf_counter()
        if saves:
            save_checkpoint(run, step, model, state)
        if evaluates:
            result = held_out_figures(step)
            progress.write(f"step {step}: held-out tau {result['tau']:.3f}, loss {result['loss']:.4f}")
        window.pause(time.perf_counter() - started)
    if result:
        (run / EVALUATION).write_text(json.dumps(result, indent=1) + "\n")
    return result


def check_norm(norm: Tensor | None, step: int) -> None:
    """Raises RunError when a step's gradient was not finite."""
    if norm is not None and not torch.isfinite(norm):
        raise RunError(f"step {step}: the gradient is not finite; lower train.lr, or look at the data")


def _append(path: Path, line: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
