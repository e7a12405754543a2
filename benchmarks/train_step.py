"""Measure the time of each part of a training step, and the share of the device's peak FLOP/s.

    python benchmarks/train_step.py                 # the example's draft on the CPU, Qwen3-4B's on a GPU
    python benchmarks/train_step.py --device cpu

The micro-batch has documents of log-normal lengths, the second half of each supervised, packed and given
anchors as in training. Tokens, states and weights are random. Parts are timed inside whole steps, on a GPU by
events on its stream. The figures are medians over the steps. The vocabulary loss computes its gradients in
the forward, so the backward is the backbone's.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen3Config

sys.path.insert(0, str(Path(__file__).parents[1]))

import train.draft.blocks.module as trained
from benchmarks.capture import QWEN3_4B, SMOLLM2
from benchmarks.record import record
from pipeline import config as configuration
from pipeline.device import resolve_device, reuse_freed_memory
from pipeline.features import default_layer_ids
from train.config import RunConfig
from train.data.loader import Batch, load_pack
from train.data.packing import epoch_packs
from train.data.sampling import random_anchors
from train.draft.blocks.collate import collate_anchors
from train.draft.dspark.config import draft_config
from train.draft.dspark.flops import training_flops
from train.draft.dspark.kind import DSPARK
from train.draft.dspark.model import Qwen3DSparkModel
from train.draft.dspark.module import DSparkStepMetrics
from train.draft.settings import run_config
from train.runtime.precision import autocast, resolve_precision
from train.trainer.metrics import peak_flops, peak_memory
from train.trainer.optimizer import build_optimizers, normalise_gradients

CONFIGS = Path(__file__).parents[1] / "configs"
# Name, config, the target's shape, mean of the logarithm of documents' lengths, timed steps.
WHOLE_VOCABULARY = Path(__file__).with_name("whole_vocabulary.toml")
CPU = ("SmolLM2-135M shape", WHOLE_VOCABULARY, SMOLLM2, 4.8, 20)
GPU = ("Qwen3-4B shape", CONFIGS / "qwen3-4b.toml", QWEN3_4B, 6.55, 50)
DOCUMENTS, WARM_UP = 1000, 5
BACKBONE, VOCABULARY = "backbone forward", "vocabulary loss"
FORWARD, REST, BACKWARD = "forward", "rest of the forward", "backward"
UPDATE, WHOLE = "normalise, optimise", "whole step"
PARTS = (BACKBONE, VOCABULARY, REST, BACKWARD, UPDATE)


class Documents:
    """Stand-in for a cache in `load_pack`: random tokens, the second half of each document supervised."""

    def __init__(self, lengths: np.ndarray, vocab_size: int):
        self.lengths, self._vocab_size = lengths, vocab_size
        self.sample_ids = np.arange(len(lengths))

    def tokens(self, i: int) -> tuple[Tensor, Tensor]:
        length = int(self.lengths[i])
        mask = torch.arange(length) >= length // 2
        return torch.randint(self._vocab_size, (length,)), mask.to(torch.uint8)


def make_batch(config: RunConfig, draft: Qwen3Config, mean_log: float, device: torch.device) -> Batch:
    """Make the first micro-batch of an epoch, with random states."""
    size, seed, rng = config.train.batch_tokens, config.train.seed, np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(mean_log, 0.8, DOCUMENTS), 16, size).astype(np.int64)
    members = epoch_packs(lengths, size, seed, 0)[0].tolist()
    collate = collate_anchors(random_anchors(config.train.anchors_per_batch, seed, 0))
    pack = load_pack(Documents(lengths, draft.vocab_size), members, size, collate)
    states = torch.randn(1, size, draft.hidden_size, dtype=torch.bfloat16, device=device)
    batch = Batch(
        **pack.fields(),
        collated=pack.collated,
        num_tokens=pack.num_tokens,
        flops=training_flops(draft, pack),
        target_hidden_states=states.repeat(1, 1, len(draft.target_layer_ids)),
        target_last_hidden_states=states,
    )
    return batch.to(device)


def make_draft(config: RunConfig, shape: dict[str, int], device: torch.device) -> Qwen3DSparkModel:
    """Make a fresh draft for a target of a shape, with frozen random embedding and head."""
    layers, tokenizer = shape["num_hidden_layers"], SimpleNamespace(mask_token_id=0)
    scales = {"embedding_scale": 1.0, "logit_scale": 1.0, "final_logit_softcapping": None}
    target = SimpleNamespace(**shape, num_layers=layers, **scales)
    manifest = SimpleNamespace(identity=SimpleNamespace(target=target, tokenizer=tokenizer))
    layer_ids = config.draft.target_layer_ids or tuple(default_layer_ids(layers))
    draft = draft_config(config.draft, Qwen3Config(**shape), manifest, layer_ids)
    torch.manual_seed(config.train.seed)
    with device:
        model = Qwen3DSparkModel(draft).float()
    model.initialize_embeddings_and_head(model.embed_tokens, model.lm_head)
    return model


class Stopwatch:
    """Times parts of a step by name; on a GPU by events on its stream, without waiting for it."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with each call timed."""

        def run(*args: Any, **kwargs: Any) -> Any:
            begun = self._now()
            result = function(*args, **kwargs)
            self._spans.append((name, begun, self._now()))
            return result

        return run

    def take(self) -> dict[str, float]:
        """Return the seconds timed since the last call, by name."""
        if self._cuda:
            torch.cuda.synchronize()
        spans, self._spans = self._spans, []
        return {name: a.elapsed_time(b) / 1000 if self._cuda else b - a for name, a, b in spans}


def measure(config: RunConfig, model: Qwen3DSparkModel, batch: Batch, steps: int) -> dict[str, float]:
    """Return the median seconds of the parts of a step of one micro-batch, and of the whole step."""
    device, watch = batch.input_ids.device, Stopwatch(batch.input_ids.device)
    module = DSPARK.on(model, config, device)
    optimizers = build_optimizers(model, config.train, DSPARK.lr_scales(config.train))
    one = torch.ones((), device=device)
    # Patch the functions that the step itself calls, so that the timed code is what training runs.
    model.hidden_states = watch.timed(BACKBONE, model.hidden_states)
    trained.vocabulary_loss = watch.timed(VOCABULARY, trained.vocabulary_loss)

    def forward() -> DSparkStepMetrics:
        with autocast(device, config.train.precision):
            return module(**batch.tensors(), denominator=one)

    def update(weight: Tensor) -> None:
        normalise_gradients(model, weight, config.train.max_grad_norm)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)

    def step() -> None:
        metrics = watch.timed(FORWARD, forward)()
        watch.timed(BACKWARD, metrics.loss.backward)()
        watch.timed(UPDATE, update)(metrics.sums.weight)

    taken = []
    for _ in range(WARM_UP + steps):
        watch.timed(WHOLE, step)()
        taken.append(watch.take())
    for each in taken:
        each[REST] = each.pop(FORWARD) - each[BACKBONE] - each[VOCABULARY]
    return {name: statistics.median(each[name] for each in taken[WARM_UP:]) for name in (*PARTS, WHOLE)}


def step_rows(
    name: str, config: RunConfig, shape: dict[str, int], mean_log: float, steps: int, device: torch.device
) -> list[tuple[str, str, float, str]]:
    """Measure a step of a fresh draft and return its rows.

    Args:
        name: of the target's shape.
        shape: the target's sizes, as in its Hugging Face config.
        mean_log: mean of the logarithm of documents' lengths.
        steps: timed steps.
    """
    model = make_draft(config, shape, device)
    batch = make_batch(config, model.config, mean_log, device)
    seconds = measure(config, model, batch, steps)
    precision, blocks = (
        resolve_precision(device, config.train.precision),
        int(batch.collated["block_keep_mask"].sum()),
    )
    case = f"{name} {precision}"
    rows = [(case, part, value, "s") for part, value in seconds.items()]
    rows.append((case, "parts together", sum(seconds[part] for part in PARTS), "s"))
    # The rates count the optimiser's time once per optimiser step, not per micro-batch.
    accumulated = config.train.micro_batches_per_step
    lasts = seconds[WHOLE] - seconds[UPDATE] + seconds[UPDATE] / accumulated
    rates = {"tokens": batch.num_tokens, "blocks": blocks, "FLOP": batch.flops}
    rows += [(case, what, amount / lasts, f"{what}/s") for what, amount in rates.items()]
    peak = peak_flops(device, precision, config.train.tf32)
    rows += [(case, "share of the peak", batch.flops / lasts / peak, "")] if peak else []
    rows.append((case, "peak memory", peak_memory(device) / 2**20, "MiB"))
    print(f"{batch.num_tokens} tokens, {blocks} blocks; {accumulated} micro-batches per optimiser step")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    device = resolve_device(parser.parse_args().device)
    name, path, shape, mean_log, steps = GPU if device.type == "cuda" else CPU
    if device.type == "cpu":
        reuse_freed_memory()  # as training does
    config = run_config(configuration.load_toml(path), str(path))
    record("train_step", device, step_rows(name, config, shape, mean_log, steps, device))


if __name__ == "__main__":
    main()
