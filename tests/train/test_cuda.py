"""What only a GPU shows: its kernels give the CPU's numbers, and nothing is compiled twice."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from pipeline.features import product
from tests.conftest import EXACT, LAYERS, run_ok
from tests.train.drafts import as_pack, random_samples, small_model
from tests.train.runs import lines_of, progress_of, train_arguments, weights_of
from train.config import TrainConfig
from train.data.loader import load_batch, loaded
from train.data.sampling import random_anchors
from train.draft.blocks.collate import collate_anchors
from train.draft.dspark.module import DSparkTrainerModule
from train.draft.dspark.settings import DSparkConfig
from train.draft.settings import run_config
from train.runtime.precision import autocast
from train.trainer.setup import build_draft, set_up

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
    # What torch says while its compiler is imported; the compiler's advice, where tests ask for exact
    # products; and what torch says of a mode that tests use.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
]
TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
ROOT = Path(__file__).parents[2]
MASKS = [[0, 1, 1, 1, 1, 1] * 9, [1, 1, 1, 0, 1, 1] * 7, [1] * 40]
ANCHORS = [[1, 3, 4, 20], [0, 1, 4, 18], [0, 2, 5, 30]]


@pytest.fixture(autouse=True)
def nothing_is_left_of_earlier_tests() -> None:
    """A run sets for its process whether products may round to TF32, and compiles for its own shapes."""
    torch.set_float32_matmul_precision("highest")
    torch._dynamo.reset()


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
    settings = {"markov_head_type": head, "head_dim": 16}
    wanted, wanted_gradients = run(small_model(**settings).float(), packed("cpu", torch.float32))
    model = small_model(**settings).float().cuda()
    model.attention = attention
    assert_same_numbers(run(model, packed("cuda", torch.float32)), (wanted, wanted_gradients))


Numbers = tuple[torch.Tensor, dict[str, torch.Tensor]]


def assert_same_numbers(found: Numbers, wanted: Numbers) -> None:
    """A loss and its gradients, but for the order in which a GPU adds up."""
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-4, atol=1e-5)
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        scale = gradient.abs().max().clamp(min=1e-6)
        torch.testing.assert_close(
            found[1][name] / scale, gradient / scale, rtol=1e-3, atol=1e-3, msg=f"{name} differs"
        )


# Queries of flex_attention: fewer than a tile of 128, and several.
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("attention", ["sdpa", "flex"])
def test_packs_of_two_sizes_go_through_one_compiled_module(attention: str, checkpointing: bool) -> None:
    """The last pack of an epoch is smaller, and the first of the next is large again."""
    model = small_model(head_dim=16).float().cuda()
    module = DSparkTrainerModule(model, 4.0)
    train = TrainConfig(compile="on", precision="fp32", tf32=False, activation_checkpointing=checkpointing)
    module.prepare(run_config({"draft": {"attention": attention}, "train": train}), torch.device("cuda"))
    for repeats in (12, 1, 11, 12):
        wanted = run(small_model(head_dim=16).float(), packed("cpu", torch.float32, repeats))
        model.zero_grad(set_to_none=True)
        metrics = module(**packed("cuda", torch.float32, repeats))
        metrics.loss.backward()
        gradients = {n: p.grad.double().cpu() for n, p in model.named_parameters() if p.grad is not None}
        assert_same_numbers((metrics.loss.detach().double().cpu(), gradients), wanted)
        with torch.no_grad():  # as an evaluation in between
            again = module(**packed("cuda", torch.float32, repeats)).loss
        torch.testing.assert_close(again.double().cpu(), wanted[0], rtol=1e-4, atol=1e-5)


@contextmanager
def waits(mode: str) -> Iterator[None]:
    """Set what torch does about operations that wait for the GPU: `error` refuses them."""
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_micro_batch_never_waits_for_the_gpu(cache_dir: Path, precision: str) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    draft = DSparkConfig(num_layers=1, block_size=3, markov_rank=8, head_dim=16)
    settings = {"batch_tokens": 256, "anchors_per_batch": 64, "held_out": 0.2, "precision": precision}
    setup = set_up(cache_dir, run_config({"draft": draft, "train": settings}), device)
    module = setup.kind.on(build_draft(setup).to(device), setup.config, device)
    pack = (setup.samples[:2].tolist(), setup.kind.collate(random_anchors(64, 0, 0)))
    layers = tuple(setup.shape.target_layer_ids)
    once, again = loaded(setup.reader, [pack, pack], layers, 256, device)
    one = torch.ones((), device=device)
    for batch, mode in ((once, "default"), (again, "error")):  # the first one compiles, and allocates
        with waits(mode):
            with autocast(device, precision):
                loss = module(**batch.tensors(), denominator=one).loss
            loss.backward()


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
    "soft, another head": {"vocab": 10_007, "soft": True, "own_head": True},
    "a part of the target's vocabulary": {"vocab": 4104, "target_vocab": 5003, "whole": True, "soft": True},
}


@pytest.mark.parametrize("case", KERNEL_CASES)
def test_the_losss_kernel_has_the_definitions_numbers(case: str, monkeypatch) -> None:
    from tests.gpu_less.loss_cases import LossCase, compute, define
    from train.losses import chunks

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
    module.prepare(run_config({"train": {"compile": "on"}}), torch.device("cuda"))
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


def test_a_capture_on_a_gpu_is_the_cpus(
    cache_dir: Path, target_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    from pipeline.cache import CacheReader

    small = ("--layers", LAYERS, "--shard-tokens", "512", "--batch-tokens", "256", *EXACT)
    place = ("--target", target_dir, "--data", data_file, "--cache", tmp_path / "c")
    run_ok("capture", *place, *small, "--dtype", "float32", "--device", "cuda")
    found, wanted = CacheReader(tmp_path / "c"), CacheReader(cache_dir)
    assert found.sample_ids.tobytes() == wanted.sample_ids.tobytes()
    for number in range(len(wanted)):
        one, other = found.read(number), wanted.read(number)
        assert torch.equal(one.input_ids, other.input_ids)
        for name in ("context", "last_hidden"):  # fp32, rounded to bf16: a last bit at most
            torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_on_a_gpu_end_to_end(cache_dir: Path, tmp_path: Path, precision: str) -> None:
    settings = {"train__max_steps": 30, "draft__head_dim": 16, "train__precision": precision}
    run_ok(*on_gpu(train_arguments(cache_dir, tmp_path / "r", **settings)))
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
    found = json.loads(run_ok(*speculate, *options))
    (greedy, sampled), prompts = found["runs"], found["prompts"]
    assert prompts > 2
    assert greedy["identical"] + len(greedy["partings"]) == prompts
    assert dtype == "bfloat16" or greedy["identical"] == prompts
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


@TWO_GPUS
@pytest.mark.parametrize("parallelism", ["ddp", "fsdp"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_two_gpus_train_as_one(cache_dir: Path, tmp_path: Path, parallelism: str, precision: str) -> None:
    settings = {"train__max_steps": 6, "train__micro_batches_per_step": 4, "draft__head_dim": 16}
    settings |= {"train__precision": precision, "train__tf32": "false", "train__parallelism": parallelism}
    run_ok(*on_gpu(train_arguments(cache_dir, tmp_path / "one", **settings)))
    arguments = on_gpu(train_arguments(cache_dir, tmp_path / "two", **settings))
    arguments[arguments.index("--run")] = "--run-dir"  # torchrun has a --run of its own
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m")
    run_python(*torchrun, *arguments)
    assert progress_of(tmp_path / "two")["tokens"] == progress_of(tmp_path / "one")["tokens"]
    if precision == "fp32":
        assert_near(tmp_path / "two", tmp_path / "one")
    one, two = (lines_of(tmp_path / name)[-1]["held_out"] for name in ("one", "two"))
    assert two["tau"] == pytest.approx(one["tau"], abs=0.02)


def run_python(*words: str | Path) -> None:
    """Run Python in a new process: CUDA does not survive a fork."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# A process of the second GPU leaves the first alone, or eight ranks take half a gigabyte each there.
ALONE = """
import sys, torch
from pipeline.cli import cli
cli.main(sys.argv[1:], standalone_mode=False)
assert [torch._C._cuda_hasPrimaryContext(i) for i in (0, 1)] == [False, True]
"""


@TWO_GPUS
def test_a_process_opens_no_context_on_another_gpu(
    cache_dir: Path, target_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    place = ("--target", target_dir, "--data", data_file, "--cache", tmp_path / "c")
    run_python("-c", ALONE, "capture", *place, "--layers", LAYERS, "--device", "cuda:1")
    arguments = on_gpu(train_arguments(cache_dir, tmp_path / "r", train__max_steps=6, draft__head_dim=16))
    run_python("-c", ALONE, *("cuda:1" if word == "cuda" else word for word in arguments))
