"""Section `train`: the real command at Qwen3-4B's shape, its waits for data and for the GPU."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.gpu.commands import dspark, last_line, log_rows, settings
from benchmarks.gpu.figures import Figure, Limit, Row, SkipSection, judged
from benchmarks.gpu.place import Place
from tests.gpu_less.budget import BUDGET

# Calls by which the host waits for the GPU, in a trace.
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy")
# What marks a thread as one of the step: the loop's, and autograd's. The loader's threads may wait.
LOOP, AUTOGRAD = "ProfilerStep#", "autograd::engine::evaluate_function"
TRACED, MICRO_BATCHES = 2, 4
TINY = {
    "draft.num_layers": 1,
    "draft.block_size": 3,
    "draft.markov_rank": 8,
    "train.batch_tokens": 256,
    "train.anchors_per_batch": 16,
    "train.max_steps": 7,
}
FULL = {"train.max_steps": 12, "train.log_every": 4}
SMALL = {**FULL, "draft.num_layers": 2, "train.anchors_per_batch": 256}


def train(place: Place) -> list[Figure]:
    """Train on the cache of the section `capture`, and read its log and its trace.

    Raises:
        SkipSection: that section has not left a cache.
    """
    place = place.sized()
    run, values = place.folder / "run", shape_settings(place)
    words = ("train", "--cache", captured(place), "--run", run, "--device", "cuda")
    options = settings({**values, "train.precision": "bf16"})
    if place.pretend:  # the profiler sees nothing of it
        waits, steps = _watch_pretended_steps(), values["train.max_steps"] - 1
        dspark(*words, *options)
    else:
        dspark(*words, "--profile", str(TRACED), *options)
        waits, steps = waits_in(run / "trace.json"), TRACED
    for name, count in waits.most_common():
        print(f"{count:6d} {name}")
    case = f"train, {place.pick('Qwen3-4B shape', 'Qwen3-4B shape, 2 layers', 'tiny shape')} bf16"
    rows: list[Row] = [
        (case, "host syncs", sum(waits.values()) / steps, "per step"),
        *log_rows(case, last_line(run)),
    ]
    place.record("train", rows)
    limits = {"wait for data": Limit(at_most=5.0, speed=True), "host syncs": Limit(at_most=budget())}
    return judged(rows, limits, pretend=place.pretend)


def captured(place: Place) -> Path:
    """Return the cache that the section `capture` left. Raise SkipSection if there is none."""
    cache = place.folder.parent / "capture" / "first"
    if not (cache / "manifest.json").is_file():
        raise SkipSection("needs the cache that the section capture leaves: run both, with --fresh")
    return cache


def shape_settings(place: Place) -> dict[str, Any]:
    """Return settings of a short run at Qwen3-4B's shape, or the part of it that fits the GPU."""
    return {**place.pick(FULL, SMALL, TINY), "train.micro_batches_per_step": MICRO_BATCHES}


def budget() -> int:
    """Return how often the host may wait for the GPU in a step."""
    return BUDGET["optimiser step"] + MICRO_BATCHES * BUDGET["micro-batch"]


def waits_in(trace: Path) -> Counter[str]:
    """Return how often the threads of a step waited for the GPU in a Chrome trace, by the name of the call.

    Raises:
        ValueError: the trace holds no step, or no call of CUDA at all.
    """
    opened = gzip.open if trace.suffix == ".gz" else open
    with opened(trace) as file:
        events = json.load(file)["traceEvents"]
    return count_waits(events)


def count_waits(events: list[dict[str, Any]]) -> Counter[str]:
    """Return how often the threads of a step waited for the GPU, by the name of the call.

    Raises:
        ValueError: as `waits_in`.
    """
    whole = [event for event in events if "dur" in event]
    steps = [
        event
        for event in whole
        if event["name"].startswith(LOOP) and event.get("cat") != "gpu_user_annotation"
    ]
    calls = [event for event in whole if event.get("cat") in ("cuda_runtime", "cuda_driver")]
    if not steps or not calls:
        raise ValueError(f"the trace has {len(steps)} steps and {len(calls)} calls of CUDA: nothing to count")
    threads = {event["tid"] for event in steps}
    threads |= {event["tid"] for event in whole if event["name"].startswith(AUTOGRAD)}
    first = min(event["ts"] for event in steps)
    last = max(event["ts"] + event["dur"] for event in steps)
    return Counter(
        event["name"]
        for event in calls
        if event["name"] in WAITS and event["tid"] in threads and first <= event["ts"] <= last
    )


def _watch_pretended_steps() -> Counter[str]:
    """Return a counter that training fills with the waits of its steps but the first, by line."""
    from tests.gpu_less.pretend import LEDGER
    from train.trainer.trainer import Training

    found: Counter[str] = Counter()
    whole = Training._step

    def watched(self: Training, step: Any) -> bool:
        LEDGER.take()
        due = whole(self, step)
        for note, count in LEDGER.take()["syncs"].items():
            if not note.thread and self.progress.step > 1:  # the first one brings what all need to the GPU
                found[str(note)] += count
        return due

    Training._step = watched
    return found
