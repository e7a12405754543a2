"""Compare drafts trained from quantised caches with one trained from raw bf16.

    python benchmarks/quality.py             # about 50 minutes on two CPU cores
    python benchmarks/quality.py --keep DIR  # keeps caches and runs in DIR; a later call continues with them

The example's target is captured once in bf16. The other caches are converted from that one, so all hold the
same samples. The example's draft is trained from each with a few seeds and fewer steps than the example's. A
seed fixes a draft's initial weights, split and data order for every cache, so drafts of one seed can be
compared directly. Every draft is evaluated on the held-out samples of the RAW cache, so the teacher in the
figures is always the target's own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.record import record
from pipeline.cache import CacheReader

ROOT = Path(__file__).resolve().parents[1]
STEPS, SEEDS = 400, (0, 1, 2)
RAW = "bf16"
# Codecs of context features and of last hidden states.
CACHES = {
    RAW: ("bf16", "bf16"),
    "fp8": ("fp8", "fp8"),
    "int8": ("int8", "int8"),
    "default": ("nf4", "int8"),
    "lm3": ("lm3", "int8"),
}


def dspark(*arguments: str | Path, threads: int | None = None) -> str:
    """Run a command of this project. Return its output."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    if threads:
        environment["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, "-m", "pipeline.cli", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} exited with {done.returncode}:\n{done.stderr}")
    return done.stdout


def make_caches(folder: Path) -> None:
    dspark("capture", "--cache", folder / RAW, "--context-codec", "bf16", "--last-codec", "bf16")
    for name, (context, last) in CACHES.items():
        if name != RAW:
            dspark("convert", folder / RAW, folder / name, "--context-codec", context, "--last-codec", last)


def held_out_tau(folder: Path, name: str, seed: int) -> float:
    """Train one draft, or continue it. Return its held-out tau against the raw teacher."""
    run = folder / f"run-{name}-{seed}-{STEPS}"
    settings = {"train.seed": seed, "train.max_steps": STEPS, "train.eval_every": STEPS}
    dspark(
        "train",
        "--cache",
        folder / name,
        "--config",
        ROOT / "benchmarks/whole_vocabulary.toml",
        "--run",
        run,
        *(word for key, value in settings.items() for word in ("--set", f"{key}={value}")),
        "--device",
        "cpu",
        threads=1,
    )
    result = dspark("evaluate", "--cache", folder / RAW, "--run", run, "--device", "cpu", "--json", threads=1)
    return json.loads(result)["tau"]


def rows(folder: Path) -> list[tuple[str, str, float, str]]:
    jobs = [(name, seed) for seed in SEEDS for name in CACHES]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        done = tqdm(pool.map(lambda job: held_out_tau(folder, *job), jobs), total=len(jobs), unit="draft")
        taus = dict(zip(jobs, done, strict=True))
    results = []
    for name, codecs in CACHES.items():
        own, raw = ([taus[which, seed] for seed in SEEDS] for which in (name, RAW))
        case = f"{name} ({' context, '.join(codecs)} last)"
        reader = CacheReader(folder / name)
        stored = sum(reader.manifest.shards.bytes) / int(reader.lengths.sum())
        results += [(case, "shards", stored, "B/token")]
        results += [(case, f"held-out tau, seed {seed}", taus[name, seed], "") for seed in SEEDS]
        results += [(case, "held-out tau, mean", statistics.mean(own), "")]
        results += [(case, "held-out tau, deviation of seeds", statistics.stdev(own), "")]
        if name != RAW:
            apart = [a - b for a, b in zip(own, raw, strict=True)]
            results += [(case, "tau less raw's, mean of seeds", statistics.mean(apart), "")]
            results += [(case, "tau less raw's, deviation", statistics.stdev(apart), "")]
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, help="directory for caches and runs; default: a temporary one")
    folder = parser.parse_args().keep
    with tempfile.TemporaryDirectory(prefix="dspark-bench-") as temporary:
        folder = (folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        make_caches(folder)
        record("quality", torch.device("cpu"), rows(folder))


if __name__ == "__main__":
    main()
