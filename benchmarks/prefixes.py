"""Measure what `--share-prefixes` saves: of the example as it is, and behind a long system message.

    make setup && python benchmarks/prefixes.py

Sizes are the plan's. A capture's speed is the difference between captures of two numbers of conversations
behind the message: starting, the proof and the measuring of statistics take the same time in both.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.record import record
from capture.example import EXAMPLE_DATA, example_target
from capture.large import subjects
from capture.options import CaptureOptions, DataOptions
from capture.plan import price
from capture.prepare import PreparedCapture, prepare
from pipeline.target_model.options import TargetOptions

ROOT = Path(__file__).resolve().parents[1]
FEW, MANY = 60, 140  # statistics are of 48
MESSAGE = "You answer questions about the following subjects, briefly and in plain words: {}."


def behind_a_message(path: Path) -> Path:
    """Write the example's conversations with a long system message in front of each."""
    message = {"role": "system", "content": MESSAGE.format(", ".join(subjects()))}
    with path.open("w") as file:
        for line in EXAMPLE_DATA.read_text().splitlines():
            row = json.loads(line)
            row["messages"] = [message, *(m for m in row["messages"] if m["role"] != "system")]
            file.write(json.dumps(row) + "\n")
    return path


def planned(target: Path, data: Path, cache: Path, share: bool) -> PreparedCapture:
    """Return the plan of a capture."""
    return prepare(
        CaptureOptions(
            target=TargetOptions(target=str(target), device="cpu"),
            data=DataOptions(data=(str(data),)),
            cache=cache,
            share_prefixes=share,
        )
    )


def seconds(target: Path, data: Path, cache: Path, count: int, *more: str) -> float:
    """Return the seconds that a capture of the first conversations takes."""
    command = ["-m", "pipeline.cli", "capture", "--target", target, "--data", data, "--cache", cache]
    options = ["--num-samples", count, "--device", "cpu", "--no-proof", *more]
    began = time.perf_counter()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    words = [sys.executable, *map(str, [*command, *options])]
    subprocess.run(words, env=environment, check=True, capture_output=True)
    return time.perf_counter() - began


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder, target = Path(name), example_target().resolve()
        long = behind_a_message(folder / "long.jsonl")
        for case, data in (("the example", EXAMPLE_DATA), ("behind a system message", long)):
            for share in (False, True):
                found = planned(target, data, folder / "none", share)
                features = found.identity.features
                size = price(found, features.context_codec, features.last_codec).total
                what = f"{case}, {'shared' if share else 'each'}"
                rows += [
                    (what, "tokens", sum(found.plan.tokens), ""),
                    (what, "context rows", sum(found.plan.context_rows), ""),
                    (what, "tokens computed", found.batching.padded_tokens, ""),
                    (what, "size", size / 1e6, "MB"),
                ]
        took = {}
        for way, more in (("each", ()), ("shared", ("--share-prefixes",))):
            few, many = (seconds(target, long, folder / f"{way}-{n}", n, *more) for n in (FEW, MANY))
            took[way] = many - few
        case = f"{MANY - FEW} conversations behind it"
        rows += [(case, f"capture, {way}", each, "s") for way, each in took.items()]
        rows.append((case, "each / shared", took["each"] / took["shared"], "times"))
    record("prefixes", torch.device("cpu"), rows)


if __name__ == "__main__":
    main()
