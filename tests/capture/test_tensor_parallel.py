"""A target that transformers splits over two processes: one process's cache, and an end for every failure.

The ranks are what torchrun would start, without torchrun: nothing but themselves ends them.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.cache import CacheReader, read_manifest
from pipeline.cache.skipped import TOO_LARGE
from tests.capture.conftest import arguments, tree
from tests.conftest import assert_refused, run_cli, run_ok
from tests.processes import Dspark, finished_shards, leftovers, one_thread, start_ranks
from tests.tiny import make_conversations, make_target

# SGLang can't serve drafts of the first and the last id, which come from the embedding and the final norm.
pytestmark = pytest.mark.filterwarnings("ignore::pipeline.errors.LayerIdWarning")
SMALL = {
    "layers": "-1,0,1",
    "shard_tokens": 128,
    "batch_tokens": 128,
    "context_codec": "fp32",
    "last_codec": "fp32",
}
SPLIT = {**SMALL, "tensor_parallel": 2}
# Relative error of a state against one process's, in fp32: two halves are summed in another order.
CLOSE = 1e-5
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@pytest.fixture(autouse=True)
def not_under_torchrun(monkeypatch):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)


def small_target(folder: Path, **overrides) -> Path:
    return make_target(folder, "qwen3", dtype=torch.float32, num_hidden_layers=2, **overrides)


@pytest.fixture(scope="module")
def fp32_target(tmp_path_factory) -> Path:
    return small_target(tmp_path_factory.mktemp("target") / "small")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_conversations(tmp_path_factory.mktemp("data") / "chats.jsonl", count=12, seed=2)


@pytest.fixture(scope="module")
def single(tmp_path_factory, fp32_target, data) -> Path:
    """The cache of one process."""
    cache = tmp_path_factory.mktemp("cache") / "single"
    run_ok(*arguments(fp32_target, data, cache, **SMALL))
    return cache


def start(
    folder: Path, *command: str | Path, before: Callable[[], None] = one_thread, **variables: str
) -> list[Dspark]:
    """Start a command as two ranks, which see no GPU."""
    return start_ranks(folder, 2, *command, before=before, CUDA_VISIBLE_DEVICES="", **variables)


def finish(ranks: list[Dspark]) -> None:
    assert [rank.wait() for rank in ranks] == [0, 0], [rank.err for rank in ranks]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, fp32_target, data) -> tuple[Path, list[Dspark]]:
    """The cache of two ranks, and the ranks."""
    folder = tmp_path_factory.mktemp("split")
    ranks = start(folder / "ranks", *arguments(fp32_target, data, folder / "cache", **SPLIT))
    finish(ranks)
    return folder / "cache", ranks


def assert_close(got: Path, want: Path) -> int:
    """Compare the samples, states and target of two caches. Return the rows that only `got` has as zeros."""
    assert (got / "samples.arrow").read_bytes() == (want / "samples.arrow").read_bytes()
    assert tree(got / "target") == tree(want / "target")
    names = sorted(tree(want / "shards"))
    assert sorted(tree(got / "shards")) == names
    assert len(names) > 4
    blank = 0
    for name in names:
        ours, theirs = load_file(got / "shards" / name), load_file(want / "shards" / name)
        assert ours.keys() == theirs.keys()
        for key, tensor in theirs.items():
            if key in ("input_ids", "loss_mask"):
                assert torch.equal(ours[key], tensor), (name, key)
                continue
            blanked = ~ours[key].any(dim=-1) & tensor.any(dim=-1)
            blank += int(blanked.sum())
            error = (ours[key] - tensor).norm(dim=-1)
            assert (error <= CLOSE * tensor.norm(dim=-1))[~blanked].all(), (name, key)
    return blank


def in_layer(number: int, act: Callable[[Tensor], None]) -> None:
    """Let every forward call `act` with the states that go into a layer."""
    from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

    real = Qwen3DecoderLayer.forward

    def forward(self, hidden_states: Tensor, **options):
        if self.self_attn.layer_idx == number:
            act(hidden_states)
        return real(self, hidden_states, **options)

    Qwen3DecoderLayer.forward = forward
    one_thread()


# The same cache


def test_two_ranks_capture_what_one_process_does(whole, single):
    cache, (first, second) = whole
    assert assert_close(cache, single) == 0
    assert "good" in run_ok("verify", cache)
    assert f"cache {cache}: complete" in first.out
    said = [line for line in second.err.splitlines() if not line.startswith("[W")]  # torch's, of its store
    assert (second.out, said) == ("", []), "the first one speaks"
    assert leftovers(cache) == []
    engine = read_manifest(cache).identity.engine
    assert (engine.name, engine.tensor_parallel) == ("huggingface", 2)


def test_a_complete_cache_is_reused_and_no_other_number_of_processes_goes_on(
    tmp_path, whole, fp32_target, data
):
    cache, _ = whole
    ranks = start(tmp_path / "ranks", *arguments(fp32_target, data, cache, **SPLIT))
    finish(ranks)
    assert "reused without running the target" in ranks[0].out
    assert "loading" not in ranks[0].err
    result = run_cli(*arguments(fp32_target, data, cache, **SMALL))
    assert_refused(result, 1, f"{cache} holds another capture", "engine")


def test_the_plan_times_both_ranks(tmp_path, fp32_target, data):
    command = ["plan", *arguments(fp32_target, data, tmp_path / "cache", **SPLIT)[1:], "--probe"]
    ranks = start(tmp_path / "ranks", *command)
    finish(ranks)
    assert ranks[0].out.splitlines()[-1].startswith("probe: ")
    assert "tokens/s on cpu" in ranks[0].out
    assert ranks[1].out == ""


# Stopped, killed


def enough() -> bool:
    """True once the cache $CACHE has $AT finished shards."""
    return len(finished_shards(Path(os.environ["CACHE"]))) >= int(os.environ["AT"])


def wait_in_a_forward() -> None:
    """Let a rank wait in the middle of a forward, once there are enough shards, for a file to appear."""

    def wait(_: Tensor) -> None:
        while enough() and not (Path(os.environ["CACHE"]) / "go").exists():
            time.sleep(0.01)

    in_layer(1, wait)


def die_in_a_forward() -> None:
    """Let the rank $DIES be killed in the middle of a forward, once there are enough shards."""

    def die(_: Tensor) -> None:
        if enough():
            os.kill(os.getpid(), signal.SIGKILL)

    if os.environ["RANK"] == os.environ["DIES"]:
        in_layer(1, die)
    one_thread()


def lost(rank: Dspark) -> bool:
    """True if it ended because another one died, and said so in one line."""
    assert rank.wait() == 1, rank.err
    (error,) = rank.errors
    return "of 2 lost " in error and "the same command continues the capture" in error


def test_stopped_and_killed_it_is_continued_by_two_groups(tmp_path, whole, fp32_target, data):
    cache = tmp_path / "cache"
    command = arguments(fp32_target, data, cache, **SPLIT)
    ranks = start(tmp_path / "stopped", *command, before=wait_in_a_forward, CACHE=str(cache), AT="1")
    assert ranks[0].wait_until(lambda: finished_shards(cache)), ranks[0].err
    for rank in ranks:
        rank.send(signal.SIGTERM)
    (cache / "go").touch()
    assert [rank.wait() for rank in ranks] == [128 + signal.SIGTERM, 0], [rank.err for rank in ranks]
    (cache / "go").unlink()
    assert leftovers(cache) == []
    kept = len(finished_shards(cache))
    assert 1 <= kept < len(read_manifest(whole[0]).plan) - 1

    at = {"CACHE": str(cache), "AT": str(kept + 1), "DIES": "1"}
    ranks = start(tmp_path / "killed", *command, before=die_in_a_forward, **at)
    assert ranks[1].wait() == -signal.SIGKILL, ranks[1].err
    assert lost(ranks[0])
    assert leftovers(cache) == []

    groups = [start(tmp_path / f"group{i}", *command, "--worker", f"{i}/2") for i in range(2)]
    for group in groups:
        finish(group)
    assert tree(cache) == tree(whole[0])


def test_a_first_rank_that_dies_ends_the_other(tmp_path, fp32_target, data):
    command = arguments(fp32_target, data, tmp_path / "cache", **SPLIT)
    at = {"CACHE": str(tmp_path), "AT": "0", "DIES": "0"}
    ranks = start(tmp_path / "ranks", *command, before=die_in_a_forward, **at)
    assert ranks[0].wait() == -signal.SIGKILL, ranks[0].err
    assert lost(ranks[1])


# Failures of one rank


def little_memory() -> None:
    """Let rank 0 have no memory for 100 tokens and more, and rank 1 none for two rows, in another layer."""
    rank = int(os.environ["RANK"])

    def refuse(states: Tensor) -> None:
        rows, tokens = states.shape[:2]
        if (rows >= 2) if rank else (rows * tokens >= 100):
            with Path(os.environ["REFUSED"]).open("a") as file:
                file.write(f"{rank} {rows} {tokens}\n")
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    in_layer(rank, refuse)


def test_a_batch_that_does_not_fit_one_rank_is_split_by_all(tmp_path, data):
    target = small_target(tmp_path / "tied", tie_word_embeddings=True)
    run_ok(*arguments(target, data, tmp_path / "single", **SMALL))
    command = arguments(target, data, tmp_path / "cache", **SPLIT, bad_states="skip", max_bad_states=0.5)
    ranks = start(tmp_path / "ranks", *command, before=little_memory, REFUSED=str(tmp_path / "refused"))
    finish(ranks)
    refused = [tuple(map(int, line.split())) for line in (tmp_path / "refused").read_text().splitlines()]
    assert [line for line in refused if line[0] == 0], "rank 0 alone"
    assert [line for line in refused if line[0] == 1 and line[1] * line[2] < 100], "rank 1 alone"
    assert "do not fit the memory of cpu" in ranks[0].err
    lengths = CacheReader(tmp_path / "single").lengths
    skipped = read_manifest(tmp_path / "cache").skipped
    assert len(skipped) == (lengths >= 100).sum() > 0
    assert set(skipped.reason) == {TOO_LARGE}
    assert assert_close(tmp_path / "cache", tmp_path / "single") > 2 * lengths[lengths >= 100].sum()
    assert "good" in run_ok("verify", tmp_path / "cache")


def break_rank_1() -> None:
    def fail(states: Tensor) -> None:
        raise RuntimeError("no kernel image is available\nfor execution on the device")

    if os.environ["RANK"] == "1":
        in_layer(1, fail)
    one_thread()


def test_an_error_of_a_follower_is_said_once(tmp_path, fp32_target, data):
    command = arguments(fp32_target, data, tmp_path / "cache", **SPLIT)
    ranks = start(tmp_path / "ranks", *command, before=break_rank_1)
    assert [rank.wait() for rank in ranks] == [1, 0]
    said = "rank 1 of 2 failed: no kernel image is available for execution on the device"
    assert [rank.errors for rank in ranks] == [[f"error: {said}"], []]


def test_a_follower_that_can_not_load_the_target_ends_all(tmp_path, fp32_target, data):
    (tmp_path / "on").mkdir()
    (tmp_path / "on" / "0").symlink_to(fp32_target)
    command = arguments(tmp_path / "on" / "{rank}", data, tmp_path / "cache", **SPLIT)
    ranks = start(tmp_path / "ranks", *command)
    assert [rank.wait() for rank in ranks] == [1, 0]
    (error,) = ranks[0].errors
    assert f"error: rank 1: no such target directory: {tmp_path / 'on' / '1'}" in error
    assert ranks[1].errors == []


# What is refused


@pytest.mark.parametrize("world", [1, 3])
def test_torchrun_has_to_start_as_many_processes(tmp_path, monkeypatch, fp32_target, data, world):
    if world > 1:
        for name, value in zip(TORCHRUN, ("2", str(world), "2"), strict=True):
            monkeypatch.setenv(name, value)
    result = run_cli(*arguments(fp32_target, data, tmp_path / "cache", **SPLIT))
    assert_refused(
        result, 2, f"needs 2 processes, got {world}", "torchrun --nproc-per-node 2 -m pipeline capture"
    )
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"tensor_parallel": 3}, "does not divide the 4 num_attention_heads of Qwen3ForCausalLM"),
        ({"tensor_parallel": 4}, "does not divide the 2 num_key_value_heads"),
        ({"tensor_parallel": 2, "device_map": "auto", "device": "auto"}, "excludes --device-map"),
        ({"tensor_parallel": 2, "adapter": "lora"}, "excludes --adapter"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_can_not_be_split_is_refused_before_any_weights(tmp_path, fp32_target, data, options, said):
    command = arguments(fp32_target, data, tmp_path / "cache", **SMALL, **options)
    assert_refused(run_cli("plan", *command[1:]), 2, "--tensor-parallel", said)


def test_answers_of_a_split_target_are_refused(tmp_path, fp32_target, data):
    command = arguments(fp32_target, data, tmp_path / "cache", **SPLIT)
    assert_refused(run_cli(*command, "--regenerate"), 2, "--tensor-parallel 2 excludes --regenerate")


def test_a_family_without_a_plan_is_refused_by_name(tmp_path, data):
    target = make_target(tmp_path / "gpt2", "gpt2", dtype=torch.float32)
    result = run_cli("plan", *arguments(target, data, tmp_path / "cache", **SPLIT)[1:])
    assert_refused(result, 2, "no plan to split GPT2LMHeadModel (model type gpt2)", "--device-map auto")


def test_quantised_weights_are_refused(tmp_path, fp32_target, data):
    target = tmp_path / "fp8"
    shutil.copytree(fp32_target, target)
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (target / "config.json").write_text(json.dumps(config))
    result = run_cli("plan", *arguments(target, data, tmp_path / "cache", **SPLIT)[1:])
    assert_refused(result, 2, "has quantised weights", "--engine vllm")


def test_the_device_is_the_one_that_transformers_takes(tmp_path, monkeypatch, fp32_target, data):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    result = run_cli("plan", *arguments(fp32_target, data, tmp_path / "cache", **SPLIT)[1:])
    assert_refused(result, 2, "a cuda device of its own", "--device cpu")
