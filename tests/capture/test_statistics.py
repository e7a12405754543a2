"""Captures that store states by codecs: the figures first, and the same bytes always."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import capture.run
from capture.data.conversations import TokenizedSample
from capture.engines.huggingface import HuggingFaceEngine
from capture.options import CaptureOptions, DataOptions
from capture.plan import price
from capture.prepare import prepare
from capture.shards.statistics import measure_statistics
from pipeline.cache import CacheReader, read_manifest
from pipeline.cache.codecs import CODECS, Statistics
from pipeline.target_model.options import TargetOptions
from tests.capture.conftest import arguments, tree
from tests.capture.test_fill import after_each_forward, measured
from tests.conftest import LAYERS, assert_refused, run_cli, run_ok
from tests.processes import Dspark, finished_shards
from tests.tiny import make_conversations, make_target
from tests.train.runs import train_arguments

FILE = "statistics.safetensors"
DEFAULT = {"context_codec": "nf4", "last_codec": "int8"}
PAIRS = [
    ("fp16", "fp16"),
    ("fp32", "fp32"),
    ("fp8", "fp8"),
    ("int8", "int8"),
    ("nf4", "int8"),
    ("lm3", "int8"),
]
SMALL = {"shard_tokens": 64, "batch_tokens": 64}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_conversations(tmp_path_factory.mktemp("data") / "chats.jsonl", count=40, seed=8)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, fp32_target, data) -> Path:
    """The nf4 and int8 cache of one undisturbed process, of many small shards."""
    cache = tmp_path_factory.mktemp("cache") / "whole"
    run_ok(*arguments(fp32_target, data, cache, **DEFAULT, **SMALL))
    return cache


def prepared_for(target: Path, data: Path, cache: Path, **options: Any):
    return prepare(
        CaptureOptions(
            target=TargetOptions(target=str(target), dtype="float32"),
            data=DataOptions(data=(str(data),)),
            cache=cache,
            layer_ids=tuple(map(int, LAYERS.split(","))),
            **{"shard_tokens": 512, "batch_tokens": 256, **options},
        )
    )


@torch.no_grad()
def expected_statistics(target: Path, samples: list[np.ndarray]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By Hugging Face's own hidden states and numpy in double, position 0 left out."""
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    rows: dict[str, list[np.ndarray]] = {}
    for ids in samples:
        states = model(torch.from_numpy(ids).long()[None], output_hidden_states=True).hidden_states
        for layer_id in map(int, LAYERS.split(",")):
            rows.setdefault(f"context.{layer_id}", []).append(states[layer_id + 1][0, 1:].double().numpy())
        rows.setdefault("last_hidden", []).append(states[-1][0, 1:].double().numpy())
    found = {}
    for name, pieces in rows.items():
        every = np.concatenate(pieces)
        deviation = every.std(axis=0)
        floor = 0.01 * np.sort(deviation)[(len(deviation) - 1) // 2]
        found[name] = (every.mean(axis=0), np.maximum(deviation, floor))
    return found


# The figures


def test_the_figures_are_numpys_over_the_samples_of_the_plan(whole, fp32_target):
    """40 samples are all measured; a later token than the 512th there is not."""
    reader = CacheReader(whole)
    expected = expected_statistics(
        fp32_target, [reader.read(i).input_ids.numpy() for i in range(len(reader))]
    )
    found = load_file(whole / FILE)
    assert found.keys() == {f"{state}.{part}" for state in expected for part in ("mean", "deviation")}
    for state, (mean, deviation) in expected.items():
        np.testing.assert_allclose(found[f"{state}.mean"], mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found[f"{state}.deviation"], deviation, rtol=1e-4)


def test_of_many_samples_48_are_measured_and_of_a_long_one_512_tokens(tmp_path, fp32_target, monkeypatch):
    lengths = []
    after_each_forward(monkeypatch, lambda ids, states: lengths.append(tuple(ids.shape)))
    data = make_conversations(tmp_path / "many.jsonl", count=120, seed=4)
    prepared = prepared_for(fp32_target, data, tmp_path / "cache", **DEFAULT)
    target = HuggingFaceEngine(prepared.target.model(), prepared.layer_ids)
    identity = prepared.full_identity()

    class Long:
        """Every sample said again and again."""

        def __getitem__(self, i: int) -> TokenizedSample:
            sample = prepared.data[i]
            return TokenizedSample(
                i, np.tile(sample.input_ids, 40)[:600], np.tile(sample.loss_mask, 40)[:600]
            )

    measure_statistics(target, identity, prepared.data, prepared.batching.order)
    assert len(lengths) == 48
    assert {rows for rows, _ in lengths} == {1}
    lengths.clear()
    measure_statistics(target, identity, Long(), prepared.batching.order)
    assert set(lengths) == {(1, 512)}


def test_the_first_token_changes_nothing(tmp_path, fp32_target, data, whole, monkeypatch):
    """Where its states are as huge as an attention sink's."""

    def poison(input_ids: torch.Tensor, states: dict[int | str, torch.Tensor]) -> None:
        for state in states.values():
            state[:, 0] = 1e8

    after_each_forward(monkeypatch, poison)
    prepared = prepared_for(fp32_target, data, tmp_path / "cache", **DEFAULT, **SMALL)
    target = HuggingFaceEngine(prepared.target.model(), prepared.layer_ids)
    identity = prepared.full_identity()
    found = measure_statistics(target, identity, prepared.data, prepared.batching.order)
    expected = load_file(whole / FILE)
    for state, values in found.items():
        assert torch.equal(values.mean, expected[f"{state}.mean"])
        assert torch.equal(values.deviation, expected[f"{state}.deviation"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_states_are_refused_before_anything_is_measured(tmp_path, fp32_target, data, monkeypatch, value):
    def spoil(input_ids: torch.Tensor, states: dict[int | str, torch.Tensor]) -> None:
        states[2][0, 1, 3] = value

    with monkeypatch.context() as patch:
        after_each_forward(patch, spoil)
        result = run_cli(*arguments(fp32_target, data, tmp_path / "cache", **DEFAULT))
        assert_refused(result, 1, "layer 2 of the sample at row", "NaN")
    assert not (tmp_path / "cache" / FILE).exists()
    run_ok(*arguments(fp32_target, data, tmp_path / "cache", **DEFAULT))


def test_batches_that_do_not_fit_do_not_matter_to_the_figures(
    tmp_path, fp32_target, data, whole, monkeypatch
):
    def full(input_ids: torch.Tensor, _states: dict) -> None:
        if len(input_ids) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("capture.run.prove_target", lambda *_: {})
    after_each_forward(monkeypatch, full)
    options = {"batch_tokens": 1000, "shard_tokens": 1000}
    result = run_cli(*arguments(fp32_target, data, tmp_path / "cache", **DEFAULT, **options))
    assert result.exit_code == 0, result.output
    assert load_file(tmp_path / "cache" / FILE).keys() == load_file(whole / FILE).keys()


# End to end


@pytest.mark.parametrize(("context", "last"), PAIRS)
def test_each_codec_end_to_end(tmp_path, fp32_target, data, context, last):
    """Captured, verified, and within the codec's error of Hugging Face's states."""
    cache = tmp_path / "cache"
    said = run_ok(*arguments(fp32_target, data, cache, context_codec=context, last_codec=last))
    assert ": complete" in said
    assert run_ok("verify", cache).strip().endswith("all good")
    manifest = read_manifest(cache)
    assert (manifest.identity.features.context_codec, manifest.identity.features.last_codec) == (
        context,
        last,
    )
    assert (cache / FILE).exists() == (context in ("int8", "nf4", "lm3"))
    assert f"{context} context (" in run_ok("inspect", cache)
    most = {"fp16": 0.003, "fp32": 0.003, "fp8": 0.03, "int8": 0.012, "nf4": 0.11, "lm3": 0.22}
    for name, values in measured(cache, fp32_target).items():
        if name != "teacher_tv":
            codec = last if name.endswith("last_hidden") else context
            assert np.concatenate(values).mean() <= most[codec], name
    run_ok(*arguments(fp32_target, data, tmp_path / "again", context_codec=context, last_codec=last))
    assert tree(tmp_path / "again") == tree(cache)


@pytest.mark.parametrize(("context", "last"), [("bf16", "bf16"), *PAIRS])
def test_the_price_of_each_codec_is_within_2_percent(tmp_path, data, context, last):
    target = make_target(tmp_path / "target", "qwen3", dtype=torch.float32)
    expected = price(prepared_for(target, data, tmp_path / "cache"), context, last).total
    run_ok(
        *arguments(target, data, tmp_path / "cache", context_codec=context, last_codec=last, dtype="float32")
    )
    real = sum(map(len, tree(tmp_path / "cache").values()))
    assert expected == pytest.approx(real, rel=0.02)


def test_the_figures_of_an_int8_cache_are_those_of_the_cache_and_the_model(tmp_path, fp32_target):
    """So few labels a shard that every one is looked at."""
    generator, data = np.random.default_rng(0), tmp_path / "data.jsonl"
    rows = [
        {"input_ids": generator.integers(3, 250, n).tolist(), "loss_mask": [0] * (n - 4) + [1] * 4}
        for n in (5, 7, 9, 12, 20, 33, 40, 41)
    ]
    data.write_text("".join(f"{row}\n".replace("'", '"') for row in rows))
    cache = tmp_path / "cache"
    codecs = {"context_codec": "int8", "last_codec": "int8"}
    run_ok(*arguments(fp32_target, data, cache, shard_tokens=2, batch_tokens=2, **codecs))
    fidelity = read_manifest(cache).fidelity
    expected = {"teacher_tv_rows": 4.0 * len(rows)}
    for name, values in measured(cache, fp32_target).items():
        every = np.concatenate(values)
        expected |= {f"{name}_mean": every.mean(), f"{name}_p99": np.percentile(every, 99)}
    figures = {k: v for k, v in fidelity.items() if not k.startswith("proof.")}
    assert figures == pytest.approx(expected, rel=1e-2, abs=1e-6)
    assert 0.001 < figures["relative_error.context.2_mean"] < 0.012


def test_training_from_codes_needs_no_target(tmp_path, data):
    target = make_target(tmp_path / "target", seed=3)
    cache = tmp_path / "cache"
    run_ok(*arguments(target, data, cache, **DEFAULT))
    shutil.rmtree(target)
    moved = cache.rename(tmp_path / "moved")
    run_ok(*train_arguments(moved, tmp_path / "run", train__max_steps=2))
    run_ok("evaluate", "--cache", moved, "--run", tmp_path / "run")


# One cache, several processes


def test_a_killed_capture_continues_with_the_same_figures(tmp_path, fp32_target, data, whole):
    cache = tmp_path / "killed"
    command = arguments(fp32_target, data, cache, **DEFAULT, **SMALL)
    dspark = Dspark(tmp_path / "out", *command)
    assert dspark.wait_until(lambda: len(finished_shards(cache)) >= 2), dspark.err
    dspark.send(signal.SIGKILL)
    assert dspark.wait() == -signal.SIGKILL
    stamp = (cache / FILE).stat().st_mtime_ns
    assert ": complete" in run_ok(*command)
    assert (cache / FILE).stat().st_mtime_ns == stamp, "measured again"
    assert tree(cache) == tree(whole)


def test_two_workers_give_the_bytes_of_one(tmp_path, fp32_target, data, whole):
    cache = tmp_path / "cache"
    command = arguments(fp32_target, data, cache, **DEFAULT, **SMALL)
    members = [Dspark(tmp_path / f"{rank}", *command, "--worker", f"{rank}/2") for rank in range(2)]
    assert [member.wait() for member in members] == [0, 0], [member.err for member in members]
    assert tree(cache) == tree(whole)


def test_of_two_workers_that_measure_differently_the_first_one_decides(
    tmp_path, fp32_target, data, monkeypatch
):
    """The one measures; before it can publish, another has captured everything by its own figures."""
    cache, real = tmp_path / "cache", measure_statistics
    command = arguments(fp32_target, data, cache, **DEFAULT)

    def shifted(*given: Any) -> dict[str, Statistics]:
        return {
            state: Statistics(values.mean + 0.01, values.deviation * 1.5)
            for state, values in real(*given).items()
        }

    def slow(*given: Any) -> dict[str, Statistics]:
        own = real(*given)
        monkeypatch.setattr(capture.run, "measure_statistics", shifted)
        monkeypatch.setattr("pipeline.cache.CacheWriter.finalise", lambda *_: None)
        run_ok(*command)
        monkeypatch.undo()
        (cache / "progress/00000.json").unlink()  # a shard is left to the slow one
        return own

    monkeypatch.setattr(capture.run, "measure_statistics", slow)
    assert ": complete" in run_ok(*command)
    monkeypatch.setattr(capture.run, "measure_statistics", shifted)
    run_ok(*arguments(fp32_target, data, tmp_path / "other", **DEFAULT))
    assert tree(cache) == tree(tmp_path / "other")


# A directory with a capture in it


def test_lost_figures_are_measured_again(tmp_path, fp32_target, data, whole):
    cache = shutil.copytree(whole, tmp_path / "cache")
    (cache / FILE).unlink()
    stamps = {p: p.stat().st_mtime_ns for p in (cache / "shards").iterdir()}
    assert_refused(run_cli(*train_arguments(cache, tmp_path / "run")), 1, FILE, "capture again")
    assert ": complete" in run_ok(*arguments(fp32_target, data, cache, **DEFAULT, **SMALL))
    assert {p: p.stat().st_mtime_ns for p in (cache / "shards").iterdir()} == stamps
    assert tree(cache) == tree(whole)


def test_lost_figures_that_come_out_differently_are_refused(tmp_path, fp32_target, data, whole, monkeypatch):
    cache, real = shutil.copytree(whole, tmp_path / "cache"), measure_statistics
    (cache / FILE).unlink()

    def elsewhere(*given: Any) -> dict[str, Statistics]:
        found = real(*given)
        found["last_hidden"].mean[0] += 1e-3
        return found

    monkeypatch.setattr(capture.run, "measure_statistics", elsewhere)
    for _ in range(2):
        result = run_cli(*arguments(fp32_target, data, cache, **DEFAULT, **SMALL))
        assert_refused(result, 1, FILE, "differs", "run the same command again")
        assert not (cache / FILE).exists()


def test_figures_lost_before_the_last_step_are_measured_again(
    tmp_path, fp32_target, data, whole, monkeypatch
):
    """Every shard and the target are written, only the manifest is not."""
    cache = tmp_path / "cache"
    command = arguments(fp32_target, data, cache, **DEFAULT, **SMALL)
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.cache.CacheWriter.finalise", lambda *_: None)
        run_ok(*command)
    (cache / FILE).unlink()
    assert ": complete" in run_ok(*command)
    assert tree(cache) == tree(whole)


def test_verify_sets_damaged_figures_aside_and_capture_mends_them(tmp_path, fp32_target, data, whole):
    cache = shutil.copytree(whole, tmp_path / "cache")
    damaged = bytearray((cache / FILE).read_bytes())
    damaged[-2] ^= 64
    (cache / FILE).write_bytes(damaged)
    result = run_cli("verify", cache, "--repair")
    assert FILE in result.output
    assert not (cache / FILE).exists()
    assert ": complete" in run_ok(*arguments(fp32_target, data, cache, **DEFAULT, **SMALL))
    shutil.rmtree(cache / "damaged")
    assert tree(cache) == tree(whole)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"context_codec": "lm3", "last_codec": "int8"}, ["features.context_codec", "nf4", "lm3"]),
        ({"context_codec": "nf4", "last_codec": "fp8"}, ["features.last_codec", "int8", "fp8"]),
    ],
    ids=["context", "last"],
)
def test_another_codec_in_the_same_directory_is_refused(fp32_target, data, whole, options, parts):
    before = tree(whole)
    assert_refused(run_cli(*arguments(fp32_target, data, whole, **options, **SMALL)), 1, *parts)
    assert tree(whole) == before


@pytest.mark.parametrize(
    "options", [{"context_codec": "zip"}, {"last_codec": "nf4"}, {"last_codec": "lm3"}], ids=str
)
def test_a_codec_that_is_not_offered_is_a_usage_error(tmp_path, fp32_target, data, options):
    result = run_cli(*arguments(fp32_target, data, tmp_path / "cache", **options))
    assert result.exit_code == 2
    assert "bf16" in result.stderr
    assert not (tmp_path / "cache").exists()


def test_values_that_fp16_cannot_hold_stop_the_capture_in_one_line(tmp_path, fp32_target, data, monkeypatch):
    def grow(input_ids: torch.Tensor, states: dict[int | str, torch.Tensor]) -> None:
        states[2][:, 0, 3] = 1e5

    monkeypatch.setattr("capture.run.prove_target", lambda *_: {})
    after_each_forward(monkeypatch, grow)
    result = run_cli(*arguments(fp32_target, data, tmp_path / "cache", context_codec="fp16"))
    assert_refused(result, 1, "100000", "fp16", "65504")
    assert list((tmp_path / "cache/shards").glob("*")) == []


def test_every_codec_is_among_these():
    assert {name for pair in PAIRS for name in pair} | {"bf16"} == set(CODECS)
