"""Sections `tiny` and `example`: a target from its capture to speculation, in bf16, killed and resumed.

Four runs of the same settings: two that nothing interrupts, which say how much the order of a GPU's sums
changes, one that is killed and continued, and the training that is measured. The continued run has to equal
the uninterrupted one as nearly as the two uninterrupted ones equal each other.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.commands import dspark, dspark_json, exact, killed_training, last_line, log_rows, settings
from benchmarks.gpu.figures import Figure, Limit, Row, SkipSection, judged
from benchmarks.gpu.place import Place

# Largest distance of the continued run's weights, as a share of what a few steps change: one that is lost,
# done twice or taken with other moments moves them by more.
NEAR, NOISES = 0.02, 4.0


@dataclass(frozen=True)
class Target:
    """A target to capture, and the settings of a short run and of the run that is measured."""

    name: str
    folder: Path
    data: Path
    capture: tuple[str, ...]
    short: dict[str, Any]
    """Settings of the runs that are compared."""
    config: tuple[str, ...]
    """Options of the run that is measured, beyond the settings."""
    measured: dict[str, Any]
    prompts: int
    new_tokens: int


def tiny(place: Place) -> list[Figure]:
    """Go through all commands with the tests' tiny target."""
    from tests.tiny import make_conversations, make_target

    place = place.sized()
    small = {
        "draft.num_layers": 1,
        "draft.block_size": 3,
        "draft.head_dim": 16,
        "draft.markov_rank": 8,
        "train.batch_tokens": 256,
        "train.anchors_per_batch": 64,
        "train.micro_batches_per_step": 2,
        "train.held_out": 0.3,
        "train.log_every": 2,
        "train.lr": 3e-3,
        "train.precision": "bf16",
        "train.max_steps": 4 if place.pretend else 24,
        "train.checkpoint_every": 2 if place.pretend else 8,
    }
    target = Target(
        name="tiny",
        folder=make_target(place.folder / "target", "qwen3", num_hidden_layers=2 if place.pretend else 6),
        data=make_conversations(place.folder / "chats.jsonl", count=16 if place.pretend else 40),
        capture=(
            *("--layers", "0,1" if place.pretend else "0,2,4"),
            *("--shard-tokens", "512", "--batch-tokens", "256", "--dtype", "bfloat16"),
        ),
        short=small,
        config=(),
        measured={**small, "train.max_steps": 3 if place.pretend else 60},
        prompts=2 if place.pretend else 6,
        new_tokens=6 if place.pretend else 32,
    )
    return through(target, place)


def example(place: Place) -> list[Figure]:
    """Go through all commands with the example's target, trained as in its config.

    Raises:
        SkipSection: its weights are not installed, or the device is the pretend one.
    """
    if place.pretend:
        raise SkipSection(
            "its 30 layers take minutes on a pretend device, which goes through the tiny target"
        )
    from benchmarks.train_step import CONFIGS
    from capture.example import EXAMPLE_DATA, example_target
    from pipeline.errors import TargetError

    place = place.sized()
    try:
        folder = example_target()
    except TargetError as error:
        raise SkipSection(str(error)) from None
    target = Target(
        name="example",
        folder=folder,
        data=EXAMPLE_DATA,
        capture=("--dtype", "bfloat16"),
        short={
            "train.max_steps": 24,
            "train.eval_every": 0,
            "train.checkpoint_every": 8,
            "train.precision": "bf16",
        },
        config=("--config", str(CONFIGS / "example.toml")),
        measured={"train.precision": "bf16"},
        prompts=8,
        new_tokens=128,
    )
    return through(target, place)


def through(target: Target, place: Place) -> list[Figure]:
    """Capture, train, kill, resume, evaluate, calibrate and speculate. Return the figures."""
    case, cache, run = f"{target.name} bf16", place.folder / "cache", place.folder / "run"
    on = ("--device", "cuda")
    words = ("--target", target.folder, "--data", target.data, "--cache", cache)
    dspark("capture", *words, *target.capture, *on)
    figures = resumed(target, place, cache)
    dspark("train", "--cache", cache, "--run", run, *target.config, *on, *settings(target.measured))
    rows = log_rows(case, last_line(run))
    held_out = dspark_json("evaluate", "--cache", cache, "--run", run, *on)
    rows.append((case, "held-out tau", held_out["tau"], "tokens/round"))
    report = dspark_json("calibrate", "--cache", cache, "--run", run, *on)["report"]
    rows += [
        (case, f"calibration error {when}", report[when]["prefix"]["ece"], "") for when in ("before", "after")
    ]
    figures += judged(rows, {"held-out tau": Limit(at_least=1.0)}, pretend=place.pretend)
    return figures + speculated(target, place, cache, run, rows)


def speculated(target: Target, place: Place, cache: Path, run: Path, rows: list[Row]) -> list[Figure]:
    """Decode with the draft and its target. Record all rows and return these figures."""
    case = f"{target.name} bf16"
    limits = ("--num-prompts", str(target.prompts), "--max-new-tokens", str(target.new_tokens))
    words = ("--cache", cache, "--run", run, "--target", target.folder, "--dtype", "bfloat16")
    found = dspark_json("speculate", *words, *limits, "--device", "cuda")
    greedy, sampled = found["runs"]
    explained = (greedy["identical"] + len(greedy["partings"])) / found["prompts"]
    new: list[Row] = []
    for name, each in (("greedy", greedy), ("sampled", sampled)):
        how = f"{case}, {name}"
        new.append((how, "live tokens per round", each["tokens_per_round"], "tokens/round"))
        new.append((how, "live speed-up", each["speedup"], "times"))
        new.append((how, "plain decoding", each["plain_ms"], "ms/token"))
    new = [row for row in new if row[2] is not None]
    place.record("gpu", rows + new)
    lossless = exact(f"{case}, greedy", "texts that are the target's", explained, 1.0)
    return [lossless, *judged(new, {"live tokens per round": Limit(at_least=1.0)}, pretend=place.pretend)]


def resumed(target: Target, place: Place, cache: Path) -> list[Figure]:
    """Compare a run that was killed and continued with one that was not."""
    case, runs = (
        f"{target.name} bf16, killed",
        {name: place.folder / name for name in ("whole", "again", "cut")},
    )
    words = {
        name: [
            "train",
            "--cache",
            cache,
            "--run",
            run,
            *target.config,
            "--device",
            "cuda",
            *settings(target.short),
        ]
        for name, run in runs.items()
    }
    dspark(*words["whole"])
    dspark(*words["again"])
    every, total = target.short["train.checkpoint_every"], target.short["train.max_steps"]
    # One step behind a checkpoint, so that something is lost and has to be done again.
    code = killed_training(words["cut"], total - every + 1, pretend=place.pretend)
    figures = [exact(case, "exit code of the killed run", code, -9)]
    figures.append(exact(case, "its newest checkpoint's step", progress(runs["cut"])["step"], total - every))
    dspark(*words["cut"])
    names = ("step", "epoch", "steps_of_epoch", "tokens", "skipped_steps", "complete")
    whole, cut = progress(runs["whole"]), progress(runs["cut"])
    differing = [name for name in names if whole[name] != cut[name]]
    print("progress that differs:", differing)
    figures.append(exact(case, "progress that differs", len(differing), 0))
    noise = distance(runs["whole"], runs["again"])
    rows: list[Row] = [
        (case, "two uninterrupted runs differ by", noise, "of the update"),
        (case, "the resumed run differs by", distance(runs["whole"], runs["cut"]), "of the update"),
    ]
    near = Limit(at_most=max(NEAR, NOISES * noise))
    return figures + judged(rows, {"the resumed run differs by": near}, pretend=place.pretend)


def progress(run: Path) -> dict[str, Any]:
    """Return the progress that a run's newest checkpoint holds."""
    return json.loads((run / "latest" / "training.json").read_text())["progress"]


def distance(run: Path, other: Path) -> float:
    """Return the distance of two runs' weights, by what the first changed since its oldest checkpoint."""
    from safetensors.torch import load_file

    first = min((run / "checkpoints").iterdir())
    begun, one, two = (
        load_file(folder / "model.safetensors") for folder in (first, run / "latest", other / "latest")
    )
    apart = sum((one[name].double() - two[name].double()).square().sum().item() for name in one)
    moved = sum((one[name].double() - begun[name].double()).square().sum().item() for name in one)
    return (apart / moved) ** 0.5
