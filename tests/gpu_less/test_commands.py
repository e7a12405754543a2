"""Every command that computes, once on a pretend GPU: it works there, and gives what the CPU gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.conftest import run_ok
from tests.gpu_less.conftest import CODECS, capture_words
from tests.gpu_less.session import Session
from tests.train.runs import figures_of, progress_of, train_arguments, weights_of

pytestmark = pytest.mark.gpu_less
# Two layers, so that states pass between them; two micro-batches, so that sums do.
SETTINGS = {
    "draft__num_layers": 2,
    "train__micro_batches_per_step": 2,
    "train__max_steps": 6,
    "train__log_every": 2,
    "train__eval_every": 3,
    "train__checkpoint_every": 3,
    # Where a GPU compiles, packs of an evaluation have dummy blocks, and sums round otherwise.
    "train__compile": "off",
}


def words_of_training(cache: Path, run: Path, device: str, **settings) -> list[str | Path]:
    words = train_arguments(cache, run, **{**SETTINGS, **settings})
    words[words.index("cpu")] = device
    return words


def assert_same_run(run: Path, wanted: Path) -> None:
    """Losses, held-out figures and weights are the same to the last bit."""
    assert figures_of(run) == figures_of(wanted)
    weights = weights_of(run)
    for name, weight in weights_of(wanted).items():
        assert torch.equal(weights[name], weight), name


@pytest.fixture(scope="module")
def gpu_run(gpu: Session, gpu_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run trained on a pretend GPU in fp32, without a break."""
    run = tmp_path_factory.mktemp("runs") / "run"
    gpu.ok(*words_of_training(gpu_cache, run, "cuda"))
    return run


@pytest.mark.parametrize(("context", "last"), CODECS)
def test_a_capture_writes_the_cpus_bytes(
    gpu: Session, qwen: Path, data_file: Path, tmp_path: Path, context: str, last: str
) -> None:
    gpu.ok(*capture_words(qwen, data_file, tmp_path / "gpu", "cuda", context, last))
    run_ok(*capture_words(qwen, data_file, tmp_path / "cpu", "cpu", context, last))
    names = [path.name for path in (tmp_path / "cpu" / "shards").iterdir()]
    assert len(names) > 4
    for name in names:
        there, here = ((tmp_path / device / "shards" / name).read_bytes() for device in ("gpu", "cpu"))
        assert there == here, name
    gpu.ok("verify", tmp_path / "gpu")


def test_training_gives_the_cpus_numbers(gpu_cache: Path, gpu_run: Path, tmp_path: Path) -> None:
    run_ok(*words_of_training(gpu_cache, tmp_path / "cpu", "cpu"))
    assert_same_run(gpu_run, tmp_path / "cpu")


@pytest.mark.parametrize(
    "settings",
    [
        {"draft__init": "ridge"},
        {"train__optimizer": "muon"},
        {"draft__markov_head": "rnn"},
        {"draft__markov_head": "gated", "loss__confidence_alpha": 0.0},
        {"draft__markov_head": "none", "draft__confidence_with_markov": "false"},
        {"train__activation_checkpointing": "true"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_variations_train_as_on_the_cpu(
    gpu: Session, gpu_cache: Path, tmp_path: Path, settings: dict
) -> None:
    settings = {**settings, "train__max_steps": 3}
    gpu.ok(*words_of_training(gpu_cache, tmp_path / "gpu", "cuda", **settings))
    run_ok(*words_of_training(gpu_cache, tmp_path / "cpu", "cpu", **settings))
    assert_same_run(tmp_path / "gpu", tmp_path / "cpu")


def test_the_defaults_of_a_gpu_train(gpu: Session, gpu_cache: Path, tmp_path: Path) -> None:
    """bf16, compiled where there is a compiler, and a trace."""
    words = words_of_training(
        gpu_cache, tmp_path / "r", "auto", train__precision="auto", train__compile="auto"
    )
    gpu.ok(*words, "--profile", "2")
    lines = [line for line in figures_of(tmp_path / "r") if "loss" in line]
    assert lines[-1]["loss"] < lines[0]["loss"]
    machine = json.loads((tmp_path / "r" / "latest" / "training.json").read_text())["machine"]
    assert (machine["device"], machine["precision"]) == ("NVIDIA H100 80GB HBM3", "bf16")


def test_a_run_is_continued_to_the_same_end(
    gpu: Session, gpu_cache: Path, gpu_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "r"
    shutil.copytree(gpu_run, run, symlinks=True)
    shutil.rmtree(run / "checkpoints" / "step-000006")
    gpu.ok(*words_of_training(gpu_cache, run, "cuda"))
    assert progress_of(run)["step"] == 6
    assert_same_run(run, gpu_run)


@pytest.mark.parametrize("command", ["evaluate", "calibrate"])
def test_a_draft_is_measured_as_on_the_cpu(
    gpu: Session, gpu_cache: Path, gpu_run: Path, command: str
) -> None:
    words = (command, "--cache", gpu_cache, "--run", gpu_run, "--json", "--device")
    assert gpu.ok(*words, "cuda").json == json.loads(run_ok(*words, "cpu"))


def test_speculation_gives_the_cpus_tokens(gpu: Session, gpu_cache: Path, gpu_run: Path, qwen: Path) -> None:
    words = ["speculate", "--cache", gpu_cache, "--run", gpu_run, "--target", qwen, "--dtype", "float32"]
    words += ["--num-prompts", "2", "--max-new-tokens", "12", "--show", "--device"]
    for more in ([], ["--threshold", "0.3"]):
        texts = [
            out.split("step 6 beside")[0]
            for out in (gpu.ok(*words, "cuda", *more).out, run_ok(*words, "cpu", *more))
        ]
        assert texts[0] == texts[1]
        assert texts[0].count("> ") == 4  # two prompts at two temperatures


def test_speculation_works_in_bf16(gpu: Session, gpu_cache: Path, gpu_run: Path, qwen: Path) -> None:
    words = ("speculate", "--cache", gpu_cache, "--run", gpu_run, "--target", qwen, "--dtype", "bfloat16")
    greedy, _ = gpu.ok(*words, "--num-prompts", "2", "--max-new-tokens", "8", "--json").json["runs"]
    assert greedy["identical"] + len(greedy["partings"]) == 2


def test_regenerated_answers_are_the_cpus(gpu: Session, qwen: Path, data_file: Path, tmp_path: Path) -> None:
    words = ["regenerate", "--target", qwen, "--data", data_file, "--max-new-tokens", "4"]
    words += ["--dtype", "float32"]
    gpu.ok(*words, "--out", tmp_path / "gpu.jsonl", "--device", "cuda")
    run_ok(*words, "--out", tmp_path / "cpu.jsonl", "--device", "cpu")
    assert (tmp_path / "gpu.jsonl").read_bytes() == (tmp_path / "cpu.jsonl").read_bytes()


def test_a_probe_times_the_target(gpu: Session, qwen: Path, data_file: Path, tmp_path: Path) -> None:
    words = ["plan", "--target", qwen, "--data", data_file, "--cache", tmp_path / "c", "--probe"]
    assert "tokens/s on cuda:0" in gpu.ok(*words, "--dtype", "float32").out


def test_a_batch_that_does_not_fit_is_split(
    gpu: Session, qwen: Path, data_file: Path, gpu_cache: Path, tmp_path: Path
) -> None:
    """The GPU runs out of memory in the middle of a capture; the cache is whole all the same."""
    outcome = gpu.call(
        "tests.gpu_less.faults:capture_out_of_memory",
        *capture_words(qwen, data_file, tmp_path / "c", "cuda", "nf4", "int8"),
    )
    assert "such batches are split from now on" in outcome.err
    gpu.ok("verify", tmp_path / "c")
    shards = [path.name for path in (tmp_path / "c" / "shards").iterdir()]
    assert sorted(shards) == sorted(path.name for path in (gpu_cache / "shards").iterdir())
