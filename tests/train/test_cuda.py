"""What only a GPU shows: its kernels give the CPU's numbers, and nothing is compiled twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.conftest import run_ok
from tests.processes import start_ranks
from tests.train.drafts import as_pack, random_samples, small_model
from tests.train.runs import lines_of, progress_of, train_arguments, weights_of
from train.config import RunConfig, TrainConfig
from train.data.loader import load_batch, loaded
from train.data.sampling import random_anchors
from train.draft.dspark.collate import collate_anchors
from train.draft.dspark.module import DSparkTrainerModule
from train.losses.chunks import product

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
MASKS = [[0, 1, 1, 1, 1, 1] * 9, [1, 1, 1, 0, 1, 1] * 7, [1] * 40]
ANCHORS = [[1, 3, 4, 20], [0, 1, 4, 18], [0, 2, 5, 30]]


def packed(device: str, dtype: torch.dtype, repeats: int = 1) -> dict[str, torch.Tensor]:
    batch = as_pack(random_samples(MASKS * repeats), ANCHORS * repeats)
    return {
        name: value.to(device, dtype if value.is_floating_point() else value.dtype)
        for name, value in batch.items()
    }


def run(model, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    metrics = DSparkTrainerModule(model, 4.0)(**batch)
    metrics.loss.backward()
    gradients = {n: p.grad.double().cpu() for n, p in model.named_parameters() if p.grad is not None}
    return metrics.loss.detach().double().cpu(), gradients


@pytest.mark.parametrize("attention", ["sdpa", "flex"])
@pytest.mark.parametrize("head", ["vanilla", "gated", "rnn"])
def test_a_gpu_gives_the_cpus_numbers(attention: str, head: str) -> None:
    # flex_attention wants head dimensions of 16 and more
    torch.set_float32_matmul_precision("highest")
    settings = {"markov_head_type": head, "head_dim": 16}
    wanted, wanted_gradients = run(small_model(**settings).float(), packed("cpu", torch.float32))
    model = small_model(**settings).float().cuda()
    model.attention = attention
    loss, gradients = run(model, packed("cuda", torch.float32))
    torch.testing.assert_close(loss, wanted, rtol=1e-4, atol=1e-5)
    for name, gradient in wanted_gradients.items():
        scale = gradient.abs().max().clamp(min=1e-6)
        torch.testing.assert_close(
            gradients[name] / scale, gradient / scale, rtol=1e-3, atol=1e-3, msg=f"{name} differs"
        )


def test_bf16_is_near_fp32_and_sums_up_in_fp32() -> None:
    wanted, _ = run(small_model(head_dim=16).float(), packed("cpu", torch.float32))
    model = small_model(head_dim=16).float().cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        metrics = DSparkTrainerModule(model, 4.0)(**packed("cuda", torch.float32))
    assert metrics.loss.dtype == torch.float32
    assert abs(metrics.loss.item() / wanted.item() - 1) < 0.02
    left, right = (torch.rand(*shape, device="cuda").bfloat16() for shape in ((8, 4096), (4096, 8)))
    exact = left.double() @ right.double()  # sums of about 1,000, which bf16 holds to within 4
    torch.testing.assert_close(product(left, right).double(), exact, rtol=1e-4, atol=0)


KERNEL_CASES = {
    "fp32": {"vocab": 10_007},
    "a row a slot": {"vocab": 10_007, "bias": "slot"},
    "no bias, no teacher": {"vocab": 47, "bias": None, "teacher": False},
    "several chunks": {"vocab": 4104, "slots": 300, "positions": 90},
    "capped": {"vocab": 4104, "softcap": 2.0, "scale": 1.5},
}


@pytest.mark.parametrize("case", KERNEL_CASES)
def test_the_losss_kernel_has_the_definitions_numbers(case: str, monkeypatch) -> None:
    from tests.gpu_less.loss_cases import LossCase, compute, define
    from train.losses import chunks

    torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(chunks, "_cuda_elements", lambda _: 128 * 4104)
    made = LossCase(**KERNEL_CASES[case])
    wanted, plain, kernel = define(made), *(compute(made, each, "cuda") for each in ("torch", "triton"))
    for name, value in wanted.items():
        scale = max(1.0, value.double().abs().max().item())
        for got in (plain[name], kernel[name]):
            torch.testing.assert_close(
                got.double() / scale, value.double() / scale, rtol=1e-4, atol=1e-4, msg=f"{name} differs"
            )


@pytest.mark.parametrize("settings", [{}, {"softcap": 2.0}], ids=["plain", "capped"])
def test_the_losss_kernel_in_bf16_writes_over_what_all_have_read(settings: dict) -> None:
    """Every run gives the same numbers, at a size where warps run apart; and they are the definition's."""
    from tests.gpu_less.loss_cases import LossCase, compute, define

    case = LossCase(slots=700, positions=300, vocab=50_000, autocast=True, **settings)
    wanted, runs = define(case), [compute(case, "triton", "cuda") for _ in range(5)]
    for name in ("hidden", "weight", "latent"):
        gap = (runs[0][name].double() - wanted[name]).norm() / wanted[name].norm()
        assert gap < 0.02, (name, gap)
    for other in runs[1:]:
        for name in ("ce", "l1", "hidden"):  # the others are added up in any order
            assert torch.equal(other[name], runs[0][name]), name


def test_nothing_is_compiled_again_after_the_first_steps() -> None:
    from torch._dynamo.utils import counters

    model = small_model(head_dim=16).float().cuda()
    module = DSparkTrainerModule(model, 4.0)
    module.prepare(RunConfig(train=TrainConfig(compile="on")), torch.device("cuda"))
    compiled = []
    for step in range(8):
        batch = packed("cuda", torch.float32, repeats=1 + step % 3)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            module(**batch).loss.backward()
        compiled.append(counters["stats"]["unique_graphs"])
    assert compiled[0] > 0
    assert compiled[-1] == compiled[3]  # three shapes, seen once each, then nothing new


@pytest.mark.parametrize("codecs", [("bf16", "bf16"), ("nf4", "int8"), ("lm3", "fp8")])
def test_a_batch_decoded_on_the_gpu_is_the_cpus(cache_dir: Path, tmp_path: Path, codecs) -> None:
    from pipeline.cache import CacheReader

    run_ok("convert", cache_dir, tmp_path / "c", "--context-codec", codecs[0], "--last-codec", codecs[1])
    reader = CacheReader(tmp_path / "c")
    collate = collate_anchors(random_anchors(20, 0, 0))
    packs = [([i, i + 1, i + 2], collate) for i in range(0, 12, 3)]
    batches = loaded(reader, packs, (0, 4), 512, torch.device("cuda"))
    for (samples, _), batch in zip(packs, batches, strict=True):
        wanted = load_batch(reader, samples, (0, 4), 512, collate)
        for name, value in wanted.tensors().items():
            found = batch.tensors()[name]
            assert torch.is_tensor(found) == torch.is_tensor(value)
            assert torch.equal(torch.as_tensor(found).cpu(), torch.as_tensor(value)), name


def test_training_on_a_gpu_end_to_end(cache_dir: Path, tmp_path: Path) -> None:
    run_ok(*on_gpu(train_arguments(cache_dir, tmp_path / "r", train__max_steps=30, draft__head_dim=16)))
    logged = [line for line in lines_of(tmp_path / "r") if "held_out" not in line]
    assert logged[-1]["loss"] < logged[0]["loss"]
    assert logged[-1]["peak_memory_bytes"] > 0
    run_ok("evaluate", "--cache", cache_dir, "--run", tmp_path / "r", "--device", "cpu")


def test_a_draft_is_measured_as_on_the_cpu(cache_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "r"
    run_ok(*train_arguments(cache_dir, run, train__max_steps=30, draft__head_dim=16, train__tf32="false"))
    measure = ("evaluate", "--cache", cache_dir, "--run", run, "--json", "--device")
    wanted, figures = (json.loads(run_ok(*measure, device)) for device in ("cpu", "cuda"))
    for name in ("loss", "tau", "greedy_tau", "accept_given_prefix", "blocks"):
        assert figures[name] == pytest.approx(wanted[name], rel=1e-2), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_speculation_on_a_gpu_is_lossless(
    cache_dir: Path, target_dir: Path, tmp_path: Path, dtype: str
) -> None:
    """In bf16 texts may part where two logits are the same but for rounding, which the command checks."""
    run = tmp_path / "r"
    run_ok(*train_arguments(cache_dir, run, train__max_steps=30))
    options = ("--cache", cache_dir, "--num-prompts", "6", "--max-new-tokens", "32", "--device", "cuda")
    speculate = ("speculate", "--target", target_dir, "--run", run, "--dtype", dtype, "--json")
    greedy, sampled = json.loads(run_ok(*speculate, *options))["runs"]
    assert greedy["identical"] + len(greedy["partings"]) == 6
    assert dtype == "bfloat16" or greedy["identical"] == 6
    assert 1 <= sampled["tokens_per_round"] <= 4


def on_gpu(arguments: list[str | Path]) -> list[str | Path]:
    arguments[arguments.index("cpu")] = "cuda"
    return arguments


def assert_near(run: Path, wanted: Path) -> None:
    """Kernels add up in an order of their own, so not bit for bit."""
    weights = weights_of(run)
    for name, weight in weights_of(wanted).items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-2, atol=1e-3, msg=f"{name} differs")


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_on_a_gpu_is_continued(cache_dir: Path, tmp_path: Path, optimizer: str) -> None:
    settings = {"train__max_steps": 12, "train__checkpoint_every": 6, "draft__head_dim": 16}
    settings |= {"train__precision": "fp32", "train__tf32": "false", "train__optimizer": optimizer}
    for run in ("whole", "run"):
        run_ok(*on_gpu(train_arguments(cache_dir, tmp_path / run, **settings)))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000012")
    run_ok(*on_gpu(train_arguments(cache_dir, tmp_path / "run", **settings)))
    assert progress_of(tmp_path / "run")["step"] == 12
    assert_near(tmp_path / "run", tmp_path / "whole")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("parallelism", ["ddp", "fsdp"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_gpus_train_as_one(cache_dir: Path, tmp_path: Path, parallelism: str, precision: str) -> None:
    settings = {"train__max_steps": 6, "train__micro_batches_per_step": 4, "draft__head_dim": 16}
    settings |= {"train__precision": precision, "train__tf32": "false", "train__parallelism": parallelism}
    run_ok(*on_gpu(train_arguments(cache_dir, tmp_path / "one", **settings)))
    arguments = on_gpu(train_arguments(cache_dir, tmp_path / "two", **settings))
    for process in start_ranks(tmp_path / "out", 2, *arguments):
        assert process.wait() == 0, process.err
    assert progress_of(tmp_path / "two")["tokens"] == progress_of(tmp_path / "one")["tokens"]
    if precision == "fp32":
        assert_near(tmp_path / "two", tmp_path / "one")
    one, two = (lines_of(tmp_path / name)[-1]["held_out"] for name in ("one", "two"))
    assert two["tau"] == pytest.approx(one["tau"], abs=0.02)
