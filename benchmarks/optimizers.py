"""What Muon is worth on the example: its draft after some steps with AdamW and with Muon.

    python benchmarks/optimizers.py --cache caches/example    # about 15 minutes on two CPU cores

torch's Muon orthogonalises in bf16, which a CPU without bf16 instructions emulates some forty times slower
than the rest of the step; there this benchmark does the same iteration in fp32. Drafts of one seed see the
same batches in the same order.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path

import torch
import torch.optim._muon

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.quality import ROOT
from benchmarks.record import record
from pipeline import config as configuration
from pipeline.device import native_bf16
from train.config import RunConfig
from train.loop import train
from train.run import read_progress

STEPS, SEEDS = 200, (0, 1)
RATES = {"adamw": (2e-3, 5e-3), "muon": (2e-3, 5e-3, 1e-2)}


def orthogonalised(gradient: torch.Tensor, coefficients: tuple, steps: int, eps: float) -> torch.Tensor:
    """Newton and Schulz's iteration as Muon's, in fp32."""
    a, b, c = coefficients
    tall = gradient.shape[0] > gradient.shape[1]
    x = gradient.T if tall else gradient
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True, help="the example's cache, from `make capture`")
    cache = parser.parse_args().cache.resolve()
    if not native_bf16(torch.device("cpu")):
        torch.optim._muon._zeropower_via_newtonschulz = orthogonalised
    base = configuration.load_toml(ROOT / "configs/example.toml")
    rows = []
    for seed in SEEDS:
        seconds: dict[str, float] = {}
        for optimizer, rates in RATES.items():
            for lr in rates:
                with tempfile.TemporaryDirectory(prefix="dspark-bench-") as folder:
                    config = configuration.build(RunConfig, base)
                    settings = {"optimizer": optimizer, "lr": lr, "seed": seed, "max_steps": STEPS}
                    # The Markov head's own rate stays what the example has.
                    settings["markov_lr_scale"] = config.train.markov_lr_scale * config.train.lr / lr
                    settings["eval_every"] = 0
                    changed = dataclasses.replace(config.train, **settings)
                    run = Path(folder) / "run"
                    result = train(cache, dataclasses.replace(config, train=changed), run, device="cpu")
                    seconds.setdefault(optimizer, read_progress(run).seconds)
                case = f"{optimizer}, lr {lr:g}, {STEPS} steps, seed {seed}"
                rows.append((case, "held-out tau", result["tau"], ""))
        ratio = seconds["muon"] / seconds["adamw"]
        rows.append((f"muon, {STEPS} steps, seed {seed}", "time of steps", ratio, "x adamw"))
    record("optimizers", torch.device("cpu"), rows)


if __name__ == "__main__":
    main()
