"""A process that works on one GPU of several leaves the others alone: a context takes half a GB there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu_less.conftest import LAYERS, capture_words
from tests.gpu_less.session import Outcome, Session
from tests.train.runs import train_arguments

pytestmark = pytest.mark.gpu_less


def assert_only_on_the_second(outcome: Outcome) -> None:
    """Everything that opens a context happened on cuda:1, and something did."""
    devices = {note.device for note in outcome.contexts}
    others = [f"{count} x {note}" for note, count in outcome.contexts.items() if note.device != 1]
    assert devices == {1}, "\n".join(others)


@pytest.fixture(scope="module")
def second(
    gpu: Session, qwen: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Outcome, Path, Outcome]:
    """A cache captured and a run trained on cuda:1, and what was seen."""
    folder = tmp_path_factory.mktemp("second")
    captured = gpu.ok(*capture_words(qwen, data_file, folder / "cache", "cuda:1", "nf4", "int8"))
    words = train_arguments(folder / "cache", folder / "run", train__max_steps=4, train__eval_every=2)
    words[words.index("cpu")] = "cuda:1"
    return folder / "cache", captured, folder / "run", gpu.ok(*words)


def test_a_capture_touches_only_its_own_gpu(second) -> None:
    _, captured, _, _ = second
    threads = {note.thread for note in captured.contexts}
    assert any(name.startswith("shard") for name in threads)  # they wait for events
    assert_only_on_the_second(captured)


def test_training_touches_only_its_own_gpu(second) -> None:
    _, _, _, trained = second
    threads = {note.thread for note in trained.contexts}
    assert any(name.startswith("batches") for name in threads)  # they allocate page-locked memory
    assert_only_on_the_second(trained)


@pytest.mark.parametrize("command", ["evaluate", "calibrate"])
def test_measuring_touches_only_its_own_gpu(gpu: Session, second, command: str) -> None:
    cache, _, run, _ = second
    outcome = gpu.ok(command, "--cache", cache, "--run", run, "--device", "cuda:1")
    assert_only_on_the_second(outcome)


def test_decoding_touches_only_its_own_gpu(gpu: Session, second, qwen: Path) -> None:
    cache, _, run, _ = second
    words = ["speculate", "--cache", cache, "--run", run, "--target", qwen, "--device", "cuda:1"]
    assert_only_on_the_second(gpu.ok(*words, "--num-prompts", "1", "--max-new-tokens", "4"))


def test_regenerating_touches_only_its_own_gpu(
    gpu: Session, qwen: Path, data_file: Path, tmp_path: Path
) -> None:
    words = ["regenerate", "--target", qwen, "--data", data_file, "--out", tmp_path / "own.jsonl"]
    assert_only_on_the_second(gpu.ok(*words, "--max-new-tokens", "2", "--device", "cuda:1"))


def test_a_probe_touches_only_its_own_gpu(gpu: Session, qwen: Path, data_file: Path, tmp_path: Path) -> None:
    words = ["plan", "--target", qwen, "--data", data_file, "--cache", tmp_path / "c", "--layers", LAYERS]
    assert_only_on_the_second(gpu.ok(*words, "--probe", "--device", "cuda:1"))
