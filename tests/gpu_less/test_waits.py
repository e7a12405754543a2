"""Waits of the host for a GPU: a budget for every kind of work, and no line beyond it.

While the host waits it prepares no work, and the GPU runs dry until it has launched the next kernels.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.gpu_less.budget import BUDGET
from tests.gpu_less.conftest import capture_words
from tests.gpu_less.pretend.ledger import Note
from tests.gpu_less.session import Session
from tests.train.runs import lines_of, train_arguments

pytestmark = pytest.mark.gpu_less

# The first batch brings the codecs' statistics to the GPU.
SET_UP = "Statistics.to"
# Families whose own forward waits, in lines of transformers that no argument avoids.
WAITING_FAMILIES = {"falcon": "modeling_falcon.py", "phimoe": "modeling_phimoe.py"}


def waits(notes: dict[Note, int], inside: str, outside: str = "nothing") -> dict[Note, int]:
    """Those with a frame of function `inside` and none of `outside`."""

    def has(note: Note, function: str) -> bool:
        return any(line.rpartition(" ")[2].endswith(function) for line in note.lines)

    return {note: count for note, count in notes.items() if has(note, inside) and not has(note, outside)}


def assert_within(kind: str, times: int, notes: dict[Note, int]) -> None:
    """No more waits than the budget has for something that was done so many times."""
    assert times > 0, f"there was no {kind}"
    lines = "\n".join(f"  {count} x {note}" for note, count in notes.items())
    allowed = BUDGET[kind] * times
    assert sum(notes.values()) <= allowed, f"{allowed} waits are allowed for {times} x {kind}:\n{lines}"


def added(few: dict[Note, int], many: dict[Note, int]) -> dict[Note, int]:
    """Return what the larger of two runs has more: waits of the set-up, once each, cancel out."""
    more = {note: count - few.get(note, 0) for note, count in many.items()}
    return {note: count for note, count in more.items() if count > 0}


def test_capture(gpu: Session, qwen: Path, data_file: Path, tmp_path: Path) -> None:
    """Of half of the data, and of all: what the other half adds."""
    half = tmp_path / "half.jsonl"
    half.write_text("".join(data_file.read_text().splitlines(keepends=True)[:20]))
    batches, syncs = [], []
    for data in (half, data_file):
        words = capture_words(qwen, data, tmp_path / data.stem, "cuda", "nf4", "int8")
        batches.append(int(re.search(r"(\d+) batches of at most", gpu.ok("plan", *words[1:]).out)[1]))
        syncs.append(waits(gpu.ok(*words).syncs, "capture_shards"))
    in_forward, between = (
        [waits(each, *functions) for each in syncs]
        for functions in (("ShardFiller._run_whole",), ("ShardFiller.fill", "ShardFiller._run_whole"))
    )
    assert_within("forward of capture", batches[1] - batches[0], added(*in_forward))
    assert_within("batch of capture", batches[1], between[1])


def test_writing_shards(gpu: Session, qwen: Path, data_file: Path, tmp_path: Path) -> None:
    outcome = gpu.ok(*capture_words(qwen, data_file, tmp_path / "c", "cuda", "bf16", "bf16"))
    shards = len(list((tmp_path / "c" / "shards").iterdir()))
    assert_within("shard of capture", shards, waits(outcome.syncs, "_finish.<locals>.finish"))


def test_a_forward_of_every_family(gpu: Session) -> None:
    found = gpu.call("tests.gpu_less.families:waits").value
    assert len(found) > 50
    waiting = {family: notes for family, notes in found.items() if notes}
    assert waiting.keys() == WAITING_FAMILIES.keys(), waiting
    for family, file in WAITING_FAMILIES.items():
        assert all(file in note for note in waiting[family]), waiting[family]


@pytest.fixture(scope="module")
def trainings(gpu: Session, gpu_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """Train six steps of so many micro-batches each; once for each number."""
    done: dict[int, tuple[Path, dict[Note, int]]] = {}

    def train(micro_batches: int) -> tuple[Path, dict[Note, int]]:
        if micro_batches not in done:
            run = tmp_path_factory.mktemp("waits") / "run"
            words = train_arguments(
                gpu_cache,
                run,
                train__max_steps=6,
                train__micro_batches_per_step=micro_batches,
                train__log_every=2,
                train__eval_every=3,
                train__precision="bf16",
            )
            words[words.index("cpu")] = "cuda"
            done[micro_batches] = run, gpu.ok(*words).syncs
        return done[micro_batches]

    return train


def test_a_micro_batch(trainings: Callable) -> None:
    """Two more in each of six steps: what they add."""
    _, few = trainings(1)
    _, many = trainings(3)
    assert_within("micro-batch", 12, added(*(waits(syncs, "Training._step") for syncs in (few, many))))


def test_an_optimiser_step(trainings: Callable) -> None:
    _, syncs = trainings(1)
    assert_within("optimiser step", 6, waits(syncs, "Training._step", SET_UP))


def test_a_log_line(trainings: Callable) -> None:
    run, syncs = trainings(1)
    lines = [line for line in lines_of(run) if "loss" in line]
    assert_within("log line", len(lines), waits(syncs, "Training._log_window"))


def test_a_validation(trainings: Callable) -> None:
    run, syncs = trainings(1)
    evaluations = [line for line in lines_of(run) if "held_out" in line]
    batches = waits(waits(syncs, "validate", SET_UP), "validate", "to_numbers")
    assert_within("micro-batch of validation", len(evaluations), batches)
    assert_within("validation", len(evaluations), waits(syncs, "validate"))


def test_evaluation(gpu: Session, gpu_cache: Path, trainings: Callable) -> None:
    run, _ = trainings(1)
    outcome = gpu.ok("evaluate", "--cache", gpu_cache, "--run", run, "--device", "cuda")
    syncs = waits(outcome.syncs, "measure", SET_UP)
    forwards = max(syncs.values())  # each of them copies its anchors
    assert_within("forward of evaluation", forwards, syncs)


@pytest.mark.parametrize("temperature", ["0", "1"])
def test_decoding(gpu: Session, gpu_cache: Path, qwen: Path, trainings: Callable, temperature: str) -> None:
    run, _ = trainings(1)
    words = ["speculate", "--cache", gpu_cache, "--run", run, "--target", qwen, "--dtype", "float32"]
    words += [
        "--num-prompts",
        "2",
        "--temperature",
        temperature,
        "--device",
        "cuda",
        "--json",
        "--max-new-tokens",
    ]
    few, many = (gpu.ok(*words, str(tokens)) for tokens in (8, 24))
    for kind, function, count in (
        ("round of decoding", "decode_speculative", "rounds"),
        ("token of plain decoding", "decode_plain", "tokens"),
    ):
        before, after = (outcome.json["runs"][0][count] for outcome in (few, many))
        assert_within(kind, after - before, added(*(waits(each.syncs, function) for each in (few, many))))
