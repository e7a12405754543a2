"""Section `ranks`: two GPUs by torchrun train as one does, and each process stays on its own GPU."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

from benchmarks.gpu.commands import dspark, exact, last_line, log_rows, settings
from benchmarks.gpu.figures import Figure, Limit, Row, judged
from benchmarks.gpu.machine import require_gpus
from benchmarks.gpu.place import Place
from benchmarks.gpu.runs import progress
from benchmarks.gpu.syncs import captured, shape_settings

GPUS = 2
# In bf16 two ranks add up in another order than one: the same draft, but not to the last bit.
TAU_APART = 0.05


def ranks(place: Place) -> list[Figure]:
    """Train on one GPU, then on two by ddp and by fsdp, over the cache of the section `capture`.

    Raises:
        SkipSection: there are fewer GPUs, or no such cache.
    """
    require_gpus(GPUS)
    place = place.sized()
    cache = captured(place)
    values = {**shape_settings(place), "train.max_steps": 6, "train.log_every": 2, "train.precision": "bf16"}
    name = place.pick("Qwen3-4B shape", "Qwen3-4B shape, 2 layers", "tiny shape")
    one = place.folder / "one"
    dspark("train", "--cache", cache, "--run", one, "--device", "cuda", *settings(values))
    rows, figures = log_rows(f"one GPU, {name}", last_line(one)), []
    for way in ("ddp", "fsdp"):
        case, run = f"{GPUS} GPUs by {way}, {name}", place.folder / way
        words = ["--cache", cache, "--run-dir", run, "--device", "cuda"]
        devices = torchrun(["train", *words, *settings({**values, "train.parallelism": way})])
        rows += log_rows(case, last_line(run))
        figures.append(exact(case, "tokens", progress(run)["tokens"], progress(one)["tokens"]))
        taus = [progress(each)["evaluation"]["tau"] for each in (one, run)]
        apart: list[Row] = [(case, "held-out tau apart", abs(taus[0] - taus[1]), "tokens/round")]
        figures += judged(apart, {"held-out tau apart": Limit(at_most=TAU_APART)}, pretend=place.pretend)
        if devices:
            strays = sum(len(of) > 1 for of in devices.values())
            figures.append(exact(case, "processes with contexts on two GPUs", strays, 0))
        else:
            place.notes.append(f"nvidia-smi shows no processes, so contexts of {way} are not judged")
    place.record("ranks", rows)
    return [*figures, *judged(rows, {}, pretend=place.pretend)]


def torchrun(words: list[str | Path]) -> dict[str, set[str]]:
    """Run `python -m WORDS` as one process a GPU. Return the GPUs that each process had a context on, by pid.

    Raises:
        RuntimeError: it failed.
    """
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(GPUS),
        "-m",
    ]
    process = subprocess.Popen([*command, *map(str, words)])
    devices: dict[str, set[str]] = defaultdict(set)
    while process.poll() is None:
        for pid, gpu in processes_on_gpus():
            if pid != str(os.getpid()):
                devices[pid].add(gpu)
        time.sleep(0.2)
    if process.returncode:
        raise RuntimeError(f"torchrun {words[0]} ended with exit code {process.returncode}")
    return dict(devices)


def processes_on_gpus() -> list[tuple[str, str]]:
    """Return the pid and GPU of every context that the driver shows; none where it shows no processes."""
    query = ["nvidia-smi", "--query-compute-apps=pid,gpu_uuid", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = [line.split(", ") for line in found.stdout.splitlines() if found.returncode == 0]
    return [(line[0].strip(), line[1].strip()) for line in lines if len(line) == 2]
