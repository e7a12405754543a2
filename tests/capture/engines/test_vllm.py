"""`dspark capture --engine vllm` against a stand-in that speaks as vLLM's worker does."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from capture.engines import folder, stream, vllm, worker_process
from pipeline.cache import CacheReader, read_manifest
from tests.capture.conftest import arguments, in_data_order, tree
from tests.conftest import assert_refused, run_cli, run_ok
from tests.processes import Dspark, finished_shards
from tests.tiny import make_target


@pytest.fixture(scope="module")
def hf_cache(tmp_path_factory, fp32_target, few) -> Path:
    path = tmp_path_factory.mktemp("cache") / "hf"
    run_ok(*arguments(fp32_target, few, path, **FP32))
    return path


FP32 = {"context_codec": "fp32", "last_codec": "fp32", "layers": "-1,0,3,5"}
pytestmark = pytest.mark.filterwarnings("ignore:target layer ids")


@pytest.fixture
def through_vllm(engine_python):
    """The words of a capture through the stand-in."""

    def words(target: Path, data: Path, cache: Path, **options: Any) -> list[str | Path]:
        usual = {"engine": "vllm", "engine_python": engine_python, **FP32}
        return arguments(target, data, cache, **{**usual, **options})

    return words


def longest(cache: Path) -> tuple[int, int]:
    """Row, counted from 1 as messages do, and tokens of the longest sample that has its length for itself."""
    reader = CacheReader(cache)
    lengths = [len(reader.read(i).input_ids) for i in range(len(reader))]
    tokens = max(length for length in lengths if lengths.count(length) == 1)
    return in_data_order(cache).index(lengths.index(tokens)) + 1, tokens


def test_the_cache_is_that_of_transformers_but_for_rounding(
    tmp_path, fp32_target, few, hf_cache, through_vllm
):
    run_ok(*through_vllm(fp32_target, few, tmp_path / "cache"))
    ours, theirs = CacheReader(tmp_path / "cache"), CacheReader(hf_cache)
    assert len(ours) == len(theirs)
    for i in range(len(ours)):
        a, b = ours.read(i), theirs.read(i)
        assert (a.sample_id, a.input_ids.tolist()) == (b.sample_id, b.input_ids.tolist())
        assert a.last_positions.tolist() == b.last_positions.tolist()
    for path in sorted((hf_cache / "shards").iterdir()):
        found, wanted = load_file(tmp_path / "cache" / "shards" / path.name), load_file(path)
        assert found.keys() == wanted.keys()
        for name, rows in wanted.items():
            torch.testing.assert_close(found[name], rows, rtol=1e-4, atol=2e-5)
    mine, other = tree(tmp_path / "cache" / "target"), tree(hf_cache / "target")
    assert mine == other
    engine = read_manifest(tmp_path / "cache").identity.engine
    assert engine is not None
    assert (engine.name, engine.version, engine.tensor_parallel) == ("vllm", "0.0", 1)
    assert "all good" in run_ok("verify", tmp_path / "cache")
    assert "run by vllm 0.0\n" in run_ok("inspect", tmp_path / "cache")
    fidelity = read_manifest(tmp_path / "cache").fidelity
    assert fidelity["proof.huggingface_error"] < 1e-4
    assert fidelity["proof.logprob_error"] < 1e-4


def test_engines_do_not_continue_each_others_caches(tmp_path, fp32_target, few, hf_cache, through_vllm):
    result = run_cli(*through_vllm(fp32_target, few, hf_cache))
    assert_refused(result, 1, "engine: huggingface against vllm 0.0")
    run_ok(*through_vllm(fp32_target, few, tmp_path / "cache"))
    result = run_cli(*arguments(fp32_target, few, tmp_path / "cache", **FP32))
    assert_refused(result, 1, "engine: vllm 0.0 against huggingface")
    smaller = through_vllm(fp32_target, few, tmp_path / "cache", engine_arg="gpu_memory_utilization=0.5")
    assert "already complete" in run_ok(*smaller)
    other = through_vllm(fp32_target, few, tmp_path / "cache", engine_arg="block_size=32")
    assert_refused(run_cli(*other), 1, "engine: vllm 0.0 against vllm 0.0, block_size=32")


@pytest.mark.parametrize(
    ("fault", "parts"),
    [
        ("short", ["gave states", "expected", "torch.float32"]),
        ("half", ["torch.float16", "expected"]),
        ("other tokens", ["the states of other tokens"]),
        ("torn", ["a file that can't be read"]),
        ("cannot write", ["could not write the states of", "No space left on device"]),
        ("answers twice", ["answered", "twice"]),
        ("no file", ["never came"]),
        ("no reply", ["silent for 1 s"]),
        ("zeros", ["is all zero"]),
        ("a zero row", ["is all zero"]),
        ("not finite", ["holds NaN or infinity"]),
        ("last stream", ["are not vLLM's own", "log-probabilities"]),
        ("refuses", ["fails on the sample"]),
    ],
)
def test_rows_that_are_wrong_or_missing_are_an_error_that_names_the_sample(
    tmp_path, fp32_target, few, hf_cache, through_vllm, monkeypatch, fault, parts
):
    row, tokens = longest(hf_cache)
    monkeypatch.setenv("FAULT", fault)
    monkeypatch.setenv("FAULT_AT", str(tokens))
    monkeypatch.setattr(stream, "FILE_SECONDS", 1)
    monkeypatch.setattr(stream, "SILENCE", 1 if fault == "no reply" else 60)
    result = run_cli(*through_vllm(fp32_target, few, tmp_path / "cache"))
    assert_refused(result, 1, f"row {row} of", *parts)


@pytest.mark.parametrize(
    ("fault", "parts"),
    [
        ("swapped", ["are not vLLM's own"]),
        ("one layer", ["layer 0 of the engine is not that of transformers"]),
        ("unknown", ["sent a line that nobody expects"]),
        ("does not start", ["can't run the target", "no kernel for this target"]),
        ("silent", ["has not loaded the target in 1 s"]),
        ("dies", ["ended 4 times and finished nothing", "out of luck"]),
    ],
)
def test_an_engine_that_is_wrong_at_all_is_refused(
    tmp_path, fp32_target, few, through_vllm, monkeypatch, fault, parts
):
    monkeypatch.setenv("FAULT", fault)
    monkeypatch.setattr(stream, "LOADING", 1 if fault == "silent" else 60)
    monkeypatch.setattr(worker_process, "GRACE", 0.1)
    result = run_cli(*through_vllm(fp32_target, few, tmp_path / "cache"))
    assert_refused(result, 1, *parts)


def test_a_large_target_is_proved_by_log_probabilities_alone(
    tmp_path, fp32_target, few, through_vllm, monkeypatch
):
    monkeypatch.setattr(vllm, "COMPARED_BYTES", 0)
    run_ok(*through_vllm(fp32_target, few, tmp_path / "cache"))
    assert "proof.huggingface_error" not in read_manifest(tmp_path / "cache").fidelity
    monkeypatch.setenv("FAULT", "swapped")
    result = run_cli(*through_vllm(fp32_target, few, tmp_path / "other"))
    assert_refused(result, 1, "are not vLLM's own", "log-probabilities")


def test_an_engine_that_dies_is_started_again(
    tmp_path, fp32_target, few, hf_cache, through_vllm, monkeypatch
):
    run_ok(*through_vllm(fp32_target, few, tmp_path / "calm"))
    _, tokens = longest(hf_cache)
    for name, value in (("FAULT", "dies once"), ("FAULT_AT", str(tokens)), ("COUNT", str(tmp_path / "n"))):
        monkeypatch.setenv(name, value)
    result = run_cli(*through_vllm(fp32_target, few, tmp_path / "cache"))
    assert result.exit_code == 0, result.output
    assert "is started again" in result.stderr
    assert len((tmp_path / "n").read_text()) == 2
    assert tree(tmp_path / "cache" / "shards") == tree(tmp_path / "calm" / "shards")


def test_a_sample_that_kills_the_engine_each_time_is_a_bad_one(
    tmp_path, fp32_target, few, hf_cache, through_vllm, monkeypatch
):
    row, tokens = longest(hf_cache)
    monkeypatch.setenv("FAULT", "dies")
    monkeypatch.setenv("FAULT_AT", str(tokens))
    words = through_vllm(fp32_target, few, tmp_path / "cache")
    result = run_cli(*words)
    assert_refused(result, 1, f"row {row} of", "the engine fails on the sample", "--bad-states skip")
    result = run_cli(*words, "--bad-states", "skip")
    assert result.exit_code == 0, result.output
    assert f"row {row} of" in result.stderr
    skipped = read_manifest(tmp_path / "cache").skipped
    assert [(i + 1, reason) for i, reason in zip(skipped.source_row, skipped.reason, strict=True)] == [
        (row, "fails in the engine")
    ]
    assert "all good" in run_ok("verify", tmp_path / "cache")


def test_states_on_their_way_are_bounded(tmp_path, fp32_target, few, hf_cache, through_vllm, monkeypatch):
    _, tokens = longest(hf_cache)
    largest = tokens * 5 * 32 * 4  # layers -1, 0, 3 and the last stream, and one to spare
    monkeypatch.setattr(folder, "MAX_BYTES", largest)
    monkeypatch.setenv("WRITTEN", str(tmp_path / "written"))
    result = run_cli(*through_vllm(fp32_target, few, tmp_path / "cache"))
    assert result.exit_code == 0, result.output
    assert "states on their way from vLLM: at most" in result.stderr
    written = list(map(int, (tmp_path / "written").read_text().split()))
    assert max(written) < largest + 64 * 1024  # headers and token ids of a few files


def test_killed_and_continued_the_cache_is_the_same(tmp_path, fp32_target, few, through_vllm):
    run_ok(*through_vllm(fp32_target, few, tmp_path / "calm"))
    words = through_vllm(fp32_target, few, tmp_path / "cache")
    process = Dspark(tmp_path / "process", *words)
    assert process.wait_until(lambda: finished_shards(tmp_path / "cache"))
    process.send(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    run_ok(*words)
    assert tree(tmp_path / "cache") == tree(tmp_path / "calm")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"engine_arg": "dtype=float16"}, ["--engine-arg dtype", "give --dtype"]),
        ({"engine_arg": "enable_prefix_caching=true"}, ["--engine-arg enable_prefix_caching"]),
        ({"engine_arg": "no value"}, ["expected --engine-arg name=value"]),
        ({"device_map": "auto", "device": "auto"}, ["--device-map is an option of --engine huggingface"]),
        ({"attn_implementation": "eager"}, ["--attn-implementation is an option of --engine huggingface"]),
        ({"engine_arg": "max_model_len=64"}, ["--engine-arg max_model_len=64", "lower --max-length"]),
        ({"engine": "huggingface"}, ["--engine-python is an option of --engine vllm"]),
    ],
)
def test_options_that_contradict_each_other(tmp_path, fp32_target, few, through_vllm, options, parts):
    assert_refused(run_cli(*through_vllm(fp32_target, few, tmp_path / "cache", **options)), 2, *parts)


def test_an_environment_without_vllm_is_named(tmp_path, fp32_target, few, through_vllm):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    result = run_cli(*through_vllm(fp32_target, few, tmp_path / "cache", engine_python=python))
    assert_refused(result, 1, f"{python} has no vLLM", "--engine-python")


@pytest.mark.parametrize("more", [[], ["--regenerate"]])
def test_a_token_whose_embedding_is_zero(tmp_path, fp32_target, few, through_vllm, more):
    """The first one's states are zeros then, in every layer."""
    target = shutil.copytree(fp32_target, tmp_path / "target")
    weights = load_file(target / "model.safetensors")
    weights["model.embed_tokens.weight"][1] = 0
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    options = {"max_new_tokens": 4} if more else {}
    run_ok(*through_vllm(target, few, tmp_path / "cache", num_samples=4, **options), *more)
    reader = CacheReader(tmp_path / "cache")
    assert [int(reader.read(i).input_ids[0]) for i in range(len(reader))] == [1] * 4


@pytest.mark.parametrize("length", [103, 104])
def test_samples_as_long_as_max_length(tmp_path, fp32_target, through_vllm, length):
    """A prompt of 101 tokens, and an answer of two or three."""
    data = tmp_path / "data.jsonl"
    messages = [{"role": "user", "content": "the cat " * 30}, {"role": "assistant", "content": "dog sat on"}]
    data.write_text(json.dumps({"messages": messages}) + "\n")
    for name, more in (("plain", []), ("own", ["--regenerate", "--max-new-tokens", "6"])):
        cache = tmp_path / name
        run_ok(*through_vllm(fp32_target, data, cache, max_length=length), *more)
        (sample,) = [CacheReader(cache).read(i) for i in range(len(CacheReader(cache)))]
        assert len(sample.input_ids) <= length
        assert "all good" in run_ok("verify", cache)


def test_samples_of_two_tokens(tmp_path, fp32_target, through_vllm):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": word}) + "\n" for word in ("cat", "dog", "the")))
    run_ok(*through_vllm(fp32_target, data, tmp_path / "cache", max_length=2), "--no-proof")
    reader = CacheReader(tmp_path / "cache")
    assert [len(reader.read(i).input_ids) for i in range(len(reader))] == [2] * len(reader)


def test_answers_longer_than_the_targets_learned_positions(tmp_path, through_vllm):
    target = make_target(tmp_path / "target", "gpt2", dtype=torch.float32, max_position_embeddings=64)
    data = tmp_path / "data.jsonl"
    messages = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "the cat sat"}]
    data.write_text(json.dumps({"messages": messages}) + "\n")
    asked = through_vllm(target, data, tmp_path / "cache", max_new_tokens=100)
    result = run_cli("plan", *asked[1:], "--regenerate")
    assert_refused(result, 2, "64 learned positions", "--max-length 64")
    fits = through_vllm(target, data, tmp_path / "cache", max_new_tokens=100, max_length=64)
    assert "upper bounds" in run_ok("plan", *fits[1:], "--regenerate")
