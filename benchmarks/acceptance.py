"""Compare settings of a draft by their held-out acceptance, with seeds and paired differences.

    python benchmarks/acceptance.py example --cache caches/example    # a list of acceptance.toml
    python benchmarks/acceptance.py rank anchors --cache caches/example --seeds 0,1,2 --jobs 2

Every case of a list is trained from the same cache with each seed. Drafts of one seed see the same batches in
the same order, so a case is compared with its list's reference seed by seed. Runs that were stopped continue.
Runs whose rows are in results.csv, with the same settings and cache, are not trained again, also if the code
has changed: remove the rows, and the folder of the runs, to measure it anew.

NVIDIA's published draft and loss, of the package nemo-automodel, are trained on the same batches by
benchmarks/published.py.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.record import RESULTS, record
from pipeline import config as configuration
from pipeline.cache import CacheReader
from train.draft.settings import run_config

ROOT = Path(__file__).resolve().parents[1]
LISTS = Path(__file__).with_suffix(".toml")
TAU = "held-out tau"


@dataclass(frozen=True)
class Job:
    """One draft to train."""

    group: str
    case: str
    seed: int
    config: Path
    settings: dict[str, Any]
    published: bool
    digest: str
    """Of the whole config and the cache: lists share a draft of the same settings, and no other."""

    @property
    def name(self) -> str:
        return f"{self.group}: {self.case}, seed {self.seed} ({self.digest})"

    @property
    def arguments(self) -> list[str]:
        pairs = [f"{key}={json.dumps(value)}" for key, value in self.settings.items()]
        return [word for pair in pairs for word in ("--set", pair)]


def jobs_of(group: str, cache: Path, seeds: list[int]) -> list[Job]:
    """Return a list's jobs, seed by seed."""
    found = tomllib.loads(LISTS.read_text())[group]
    identity = CacheReader(cache).manifest.identity
    jobs = []
    for seed in seeds:
        for case, changes in found["cases"].items():
            settings = found.get("settings", {}) | changes | {"train.seed": seed}
            published = settings.pop("published", False)
            config = ROOT / settings.pop("config", found["config"])
            values = configuration.load_toml(config)
            for key, value in settings.items():
                table, name = key.split(".")
                values.setdefault(table, {})[name] = value
            lines = configuration.to_toml(run_config(values)).splitlines(keepends=True)
            # Rows are older than these two, which decide no figure where they have their defaults.
            text = "".join(line for line in lines if not line.startswith("reader = "))
            text += repr(identity).replace(", prefixes='each'", "") + str(published)
            digest = hashlib.sha256(text.encode()).hexdigest()[:6]
            jobs.append(Job(group, case, seed, config, settings, published, digest))
    return jobs


def recorded() -> dict[str, dict[str, float]]:
    """Return the rows of results.csv that this benchmark has written: a job's digest, metric, value."""
    found: dict[str, dict[str, float]] = {}
    with RESULTS.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["benchmark"] == "acceptance":
                digest = row["case"].rpartition("(")[2].rstrip(")")
                found.setdefault(digest, {})[row["metric"]] = float(row["value"])
    return found


def trained(job: Job, cache: Path, runs: Path, threads: int) -> list[tuple[str, str, float, str]]:
    """Train a draft, or continue its run, and return its rows."""
    run = runs / job.digest
    command = ["-m", "pipeline.cli", "train", "--device", "cpu"]
    if job.published:
        command = ["benchmarks/published.py"]
    command += ["--cache", str(cache), "--config", str(job.config), "--run", str(run), *job.arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{job.name} exited with {done.returncode}:\n{done.stderr}")
    file = run / ("figures.json" if job.published else "latest/training.json")
    figures = json.loads(file.read_text())
    figures = figures if job.published else figures["progress"]
    evaluation = figures["evaluation"]
    rows = [(job.name, TAU, evaluation["tau"], "")]
    for k, each in enumerate(evaluation["accept_by_position"], 1):
        rows.append((job.name, f"acceptance of slot {k}", each, ""))
    rows.append((job.name, "tokens trained on", figures["tokens"], "tokens"))
    cores = f"{threads} of {os.cpu_count()} cores"
    rows.append((job.name, f"time of all steps, {cores}", figures["seconds"], "s"))
    return rows


def summary(group: str, jobs: list[Job], found: dict[str, dict[str, float]]) -> list[str]:
    """Return a table: each case's tau, and how far from the reference it is, seed by seed."""
    reference = tomllib.loads(LISTS.read_text())[group]["reference"]
    taus: dict[str, dict[int, float]] = {}
    for job in jobs:
        taus.setdefault(job.case, {})[job.seed] = found[job.digest][TAU]
    lines = [f"{group}: held-out tau by seed, mean, and mean difference to {reference!r} +- standard error"]
    for case, by_seed in taus.items():
        apart = [tau - taus[reference][seed] for seed, tau in by_seed.items()]
        error = statistics.stdev(apart) / math.sqrt(len(apart)) if len(apart) > 1 else math.nan
        each = " ".join(f"{tau:.3f}" for tau in by_seed.values())
        mean = statistics.mean(by_seed.values())
        lines.append(f"  {case:52} {each}   {mean:.3f}   {statistics.mean(apart):+.3f} +- {error:.3f}")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("lists", nargs="+", choices=tomllib.loads(LISTS.read_text()), metavar="LIST")
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/acceptance"), help="folder of the runs")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once; each gets its share of the cores")
    options = parser.parse_args()
    cache, runs = options.cache.resolve(), options.runs.resolve()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    threads = max(1, (os.cpu_count() or 1) // options.jobs)
    by_list = {group: jobs_of(group, cache, seeds) for group in options.lists}
    known = recorded()
    left: dict[str, Job] = {}
    for job in itertools.chain(*by_list.values()):
        if job.digest not in known:
            left.setdefault(job.digest, job)
    with ThreadPoolExecutor(options.jobs) as pool:
        done = pool.map(lambda job: trained(job, cache, runs, threads), left.values())
        for rows in tqdm(done, total=len(left), unit="draft"):
            record("acceptance", torch.device("cpu"), rows)
    found = recorded()
    for group, jobs in by_list.items():
        print("\n".join(summary(group, jobs, found)))


if __name__ == "__main__":
    main()
