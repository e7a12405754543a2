"""`dspark capture --engine vllm` with a real vLLM. Run by `make prove`, or by hand: `pytest -m vllm`."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from capture.example import EXAMPLE_DATA, EXAMPLE_TARGET
from pipeline.cache import CacheReader, read_manifest
from tests.capture.conftest import arguments, tree
from tests.capture.engines.vllm_worker import ROOT, python
from tests.conftest import run_ok
from tests.processes import Dspark, finished_shards
from tests.tiny import make_conversations, make_target

pytestmark = pytest.mark.vllm
EXACT = {"context_codec": "fp32", "last_codec": "fp32"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A target with heads as large as vLLM's kernels for CPUs take them."""
    heads = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}
    return make_target(tmp_path_factory.mktemp("target") / "tiny", dtype=torch.float32, **heads)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_conversations(tmp_path_factory.mktemp("data") / "data.jsonl", count=12, seed=4)


def through_vllm(target: Path, data: Path, cache: Path, *more: str, **options: Any) -> list[str | Path]:
    chunks = ("--engine-arg", "max_num_batched_tokens=64")  # shorter than most samples
    usual = {"engine": "vllm", "engine_python": python(), **EXACT}
    return [*arguments(target, data, cache, **{**usual, **options}), *chunks, *more]


def assert_close(cache: Path, other: Path, scale: float) -> None:
    """The same tokens in the same places, and states up to rounding."""
    for path in sorted((other / "shards").iterdir()):
        found, wanted = load_file(cache / "shards" / path.name), load_file(path)
        assert found.keys() == wanted.keys()
        for name, rows in wanted.items():
            if name in ("input_ids", "loss_mask"):
                assert torch.equal(found[name], rows)
            else:
                error = (found[name] - rows).norm(dim=1) / rows.norm(dim=1)
                assert error.max() < scale, (path.name, name, float(error.max()))


def test_a_tiny_targets_cache_is_that_of_transformers(tmp_path, tiny, data):
    run_ok(*through_vllm(tiny, data, tmp_path / "cache"))
    run_ok(*arguments(tiny, data, tmp_path / "hf", **EXACT))
    assert_close(tmp_path / "cache", tmp_path / "hf", 1e-4)
    assert tree(tmp_path / "cache" / "target") == tree(tmp_path / "hf" / "target")
    assert "all good" in run_ok("verify", tmp_path / "cache")


def test_the_examples_cache_is_that_of_transformers(tmp_path):
    target = ROOT / EXAMPLE_TARGET
    if not target.exists():
        pytest.skip(f"no {target}: run `make capture`")
    few = {"num_samples": 12, "layers": "1,14,27"}
    run_ok(*through_vllm(target, EXAMPLE_DATA, tmp_path / "cache", **few))
    run_ok(*arguments(target, EXAMPLE_DATA, tmp_path / "hf", **EXACT, **few))
    assert_close(tmp_path / "cache", tmp_path / "hf", 1e-3)


def test_an_engine_that_is_killed_is_started_again(tmp_path, tiny, data):
    process = Dspark(tmp_path / "process", *through_vllm(tiny, data, tmp_path / "cache"))
    assert process.wait_until(lambda: finished_shards(tmp_path / "cache"))
    children = subprocess.run(["ps", "-eo", "pid=,comm="], capture_output=True, text=True, check=True).stdout
    engines = [int(line.split()[0]) for line in children.splitlines() if "VLLM::EngineCor" in line]
    for pid in engines:
        os.kill(pid, signal.SIGKILL)
    assert process.wait() == 0, process.err
    assert "is started again" in process.err
    run_ok(*arguments(tiny, data, tmp_path / "hf", **EXACT))
    assert_close(tmp_path / "cache", tmp_path / "hf", 1e-4)


@torch.no_grad()
def test_answers_and_states_in_one_pass_and_after_a_kill(tmp_path, tiny, data):
    words = through_vllm(tiny, data, tmp_path / "cache", "--regenerate", max_new_tokens=16)
    process = Dspark(tmp_path / "process", *words)
    assert process.wait_until(lambda: finished_shards(tmp_path / "cache"))
    process.send(signal.SIGKILL)
    process.wait()
    run_ok(*words)
    assert read_manifest(tmp_path / "cache").fidelity["second_pass_error_mean"] < 1e-4
    assert "all good" in run_ok("verify", tmp_path / "cache")
    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32).eval()
    states = [load_file(path) for path in sorted((tmp_path / "cache" / "shards").iterdir())]
    layer = next(name for name in states[0] if name.startswith("context."))
    rows, first = torch.cat([tensors[layer] for tensors in states]), 0
    number = int(layer.removeprefix("context.")) + 1
    reader = CacheReader(tmp_path / "cache")
    for i in range(len(reader)):
        ids = reader.read(i).input_ids
        found = model(ids[None].long(), output_hidden_states=True, use_cache=False).hidden_states[number][0]
        got = rows[first : first + len(ids)]
        assert ((got[:-1] - found[:-1]).norm(dim=1) / found[:-1].norm(dim=1)).max() < 1e-4
        first += len(ids)
