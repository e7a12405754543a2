"""Training runs for tests: a small draft's command line, and what a run left behind."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

SMALL = {
    "draft.num_layers": 1,
    "draft.block_size": 3,
    "train.batch_tokens": 256,
    "train.anchors_per_batch": 64,
    "train.micro_batches_per_step": 1,
    "draft.markov_rank": 8,
    "train.max_steps": 20,
    "train.held_out": 0.2,
    "train.log_every": 5,
    "train.lr": 3e-3,
    "train.precision": "fp32",  # also on a CPU that has bf16
}
# Figures of a log line that a clock or the machine decides.
MEASURED = {
    "seconds",
    "tokens_per_s",
    "blocks_per_s",
    "data_wait_percent",
    "model_flops_per_s",
    "peak_flops_percent",
    "peak_memory_bytes",
}


def train_arguments(cache: Path, run: Path, **settings) -> list[str | Path]:
    """`dspark train` with a small draft; settings as table__key=value, without those that are None."""
    values = {**SMALL, **{key.replace("__", "."): value for key, value in settings.items()}}
    arguments: list[str | Path] = ["train", "--cache", cache, "--run", run, "--device", "cpu"]
    for key, value in values.items():
        if value is None:
            continue
        arguments += ["--set", f"{key}={value}"]
    return arguments


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def figures_of(run: Path) -> list[dict]:
    """Every line of metrics.jsonl, without what a clock decides."""
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines_of(run)]


def weights_of(run: Path, checkpoint: str = "latest") -> dict[str, torch.Tensor]:
    return load_file(run / checkpoint / "model.safetensors")


def progress_of(run: Path, checkpoint: str = "latest") -> dict:
    return json.loads((run / checkpoint / "training.json").read_text())["progress"]


def checkpoint_names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())
