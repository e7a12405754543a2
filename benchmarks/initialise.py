"""Measure the gain of initial weights by ridge regression on the example's draft.

    python benchmarks/initialise.py --cache caches/example    # about 25 minutes on two CPU cores

Drafts of one seed see the same batches in the same order. Each number of steps is a separate run, because the
learning rate's schedule spans the whole run.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.quality import ROOT, dspark
from benchmarks.record import record

STEPS, SEEDS, BEGINNINGS = (1, 200, 400), (0, 1), ("random", "ridge")


def held_out_tau(folder: Path, cache: Path, init: str, steps: int, seed: int) -> float:
    """Train one draft and return its held-out tau."""
    run = folder / f"{init}-{steps}-{seed}"
    settings = {"draft.init": init, "train.max_steps": steps, "train.eval_every": 0, "train.seed": seed}
    dspark(
        "train",
        "--cache",
        cache,
        "--config",
        ROOT / "configs/example.toml",
        "--run",
        run,
        *(word for key, value in settings.items() for word in ("--set", f"{key}={value}")),
        "--device",
        "cpu",
        threads=1,
    )
    return json.loads((run / "latest" / "training.json").read_text())["progress"]["evaluation"]["tau"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True, help="the example's cache, from `make capture`")
    cache = parser.parse_args().cache.resolve()
    jobs = list(product(BEGINNINGS, STEPS, SEEDS))
    with (
        tempfile.TemporaryDirectory(prefix="dspark-bench-") as folder,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        done = pool.map(lambda job: held_out_tau(Path(folder), cache, *job), jobs)
        taus = list(tqdm(done, total=len(jobs), unit="draft"))
    rows = [
        (f"{init} first weights, {steps} steps, seed {seed}", "held-out tau", tau, "")
        for (init, steps, seed), tau in zip(jobs, taus, strict=True)
    ]
    record("initialise", torch.device("cpu"), rows)


if __name__ == "__main__":
    main()
