"""Sections `loss` and `step`: training's arithmetic at Qwen3-4B's shape."""

from __future__ import annotations

import torch

from benchmarks import loss as losses
from benchmarks import train_step
from benchmarks.capture import QWEN3_4B
from benchmarks.gpu.figures import Figure, Limit, Row, judged
from benchmarks.gpu.place import FULL, Place
from pipeline import config as configuration
from train.config import RunConfig
from train.draft.settings import run_config

CUDA = torch.device("cuda", 0)
# N, K, H, V, R. With fewer blocks the definition's logits fit a 24 GB card.
LOSSES = (losses.QWEN3_4B, (128, 7, 2560, 151936, 256), (8, 2, 64, 131, 8))
SHARE = "share of the peak"
# Percent of the peak that the fastest published vocabulary loss reaches on an H100: see docs/performance.md.
BEST_PUBLISHED = 44.0
# Share of the peak that a whole step reaches by arithmetic with the loss in torch's own operations.
WHOLE_STEP = 0.3
TINY_TARGET = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 36,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 151,
}
TINY_SETTINGS = ("draft.mask_token_id=5", "draft.markov_rank=8", "train.batch_tokens=256")


def loss(place: Place) -> list[Figure]:
    """Compare the loss and its gradients with the definition's: equality first, then time and memory."""
    place = place.sized()
    case = losses.Case("bf16 autocast", *place.pick(*LOSSES), autocast=True, tolerance=0.05)
    ways = losses.load_ways()
    if losses.resolve_kernel("auto", CUDA) != "triton":
        place.notes.append("without the Triton kernel, which can't run here")
    rows = losses.measure(case, ways, CUDA, place.pick(10, 10, 1))
    place.record("loss", rows)
    limits = {
        "time ratio": Limit(at_most=1.0, speed=True),
        "memory ratio ours/definition": Limit(at_most=0.6, speed=True),
    }
    if any(metric == SHARE for _, metric, _, _ in rows) and place.size == FULL:
        limits[f"ours {SHARE}"] = Limit(at_least=BEST_PUBLISHED, speed=True)
    return judged(rows, limits, pretend=place.pretend)


def step(place: Place) -> list[Figure]:
    """Time the parts of a training step, and compare its FLOP/s with the peak of the GPU."""
    place = place.sized()
    config = step_config(place)
    name = place.pick("Qwen3-4B shape", "Qwen3-4B shape, 2 layers, N=256", "tiny shape")
    target = place.pick(QWEN3_4B, QWEN3_4B, TINY_TARGET)
    mean_log, steps = place.pick((6.55, 40), (6.55, 30), (3.5, 2))
    rows = train_step.step_rows(name, config, target, mean_log, steps, CUDA)
    rows = place.record("train_step", rows)
    return judged(rows, step_limits(place, rows), pretend=place.pretend)


def step_config(place: Place) -> RunConfig:
    """Return the published settings for Qwen3-4B, with fewer layers and blocks for a smaller GPU."""
    path = train_step.CONFIGS / "qwen3-4b.toml"
    fewer = ("draft.num_layers=2", "train.anchors_per_batch=256")
    tiny = ("draft.num_layers=1", "train.anchors_per_batch=16", *TINY_SETTINGS)
    values = configuration.apply_overrides(configuration.load_toml(path), place.pick((), fewer, tiny))
    return run_config(values, str(path))


def step_limits(place: Place, rows: list[Row]) -> dict[str, Limit]:
    """Return the limit on the share of the peak, where that is known and the shape is the whole one."""
    known = any(metric == SHARE for _, metric, _, _ in rows)
    return {SHARE: Limit(at_least=WHOLE_STEP, speed=True)} if known and place.size == FULL else {}
