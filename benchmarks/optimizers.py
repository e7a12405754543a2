"""Compare Muon with AdamW on the example's draft after a few hundred steps.

    python benchmarks/optimizers.py --cache caches/example    # about 25 minutes on two CPU cores

torch's Muon orthogonalises in bf16. A CPU without bf16 instructions emulates that, about forty times slower
than the rest of the step, so there this benchmark does the same iteration in fp32. Drafts of one seed see the
same batches in the same order.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.optim._muon

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.quality import ROOT
from benchmarks.record import record
from pipeline import config as configuration
from pipeline.device import native_bf16
from train.draft.settings import run_config
from train.runs.directory import read_progress
from train.trainer.trainer import train

STEPS, SEEDS = 200, (0, 1)
RATES = {"adamw": (2e-3, 5e-3), "muon": (2e-3, 5e-3, 1e-2)}
TIMED_STEPS, ROUNDS = 10, 3


def orthogonalised(gradient: torch.Tensor, coefficients: tuple, steps: int, eps: float) -> torch.Tensor:
    """Return Muon's Newton-Schulz iteration of a gradient, in fp32."""
    a, b, c = coefficients
    tall = gradient.shape[0] > gradient.shape[1]
    x = gradient.T if tall else gradient
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


def trained(cache: Path, steps: int, **settings: Any) -> tuple[float, float]:
    """Train the example's draft with other settings. Return its held-out tau and the seconds per step."""
    config = run_config(configuration.load_toml(ROOT / "benchmarks/whole_vocabulary.toml"))
    settings |= {"max_steps": steps, "eval_every": 0}
    # The Markov head keeps the learning rate that it has in the example.
    lr = settings.setdefault("lr", config.train.lr)
    settings["markov_lr_scale"] = config.train.markov_lr_scale * config.train.lr / lr
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, **settings))
    with tempfile.TemporaryDirectory(prefix="dspark-bench-") as folder:
        result = train(cache, config, Path(folder) / "run", device="cpu")
        return result["tau"], read_progress(Path(folder) / "run").seconds / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True, help="the example's cache, from `make capture`")
    cache = parser.parse_args().cache.resolve()
    kind = "bf16"
    if not native_bf16(torch.device("cpu")):
        torch.optim._muon._zeropower_via_newtonschulz, kind = orthogonalised, "fp32"
    rows = []
    for seed, (optimizer, rates) in product(SEEDS, RATES.items()):
        for lr in rates:
            tau, _ = trained(cache, STEPS, optimizer=optimizer, lr=lr, seed=seed)
            rows.append((f"{optimizer}, lr {lr:g}, {STEPS} steps, seed {seed}", "held-out tau", tau, ""))
    # In turn, because a machine's speed changes.
    seconds = [
        {name: trained(cache, TIMED_STEPS, optimizer=name)[1] for name in RATES} for _ in range(ROUNDS)
    ]
    middle = {name: statistics.median(each[name] for each in seconds) for name in RATES}
    rows.append((f"muon iterating in {kind}", "time of a step", middle["muon"] / middle["adamw"], "x adamw"))
    record("optimizers", torch.device("cpu"), rows)


if __name__ == "__main__":
    main()
