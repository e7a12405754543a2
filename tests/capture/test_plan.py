"""`dspark plan`: what a capture will do and cost, before any weights are loaded."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from capture.options import CaptureOptions, DataOptions
from capture.plan import free_bytes, price
from capture.prepare import prepare
from pipeline.cache import CacheReader, read_manifest
from pipeline.cache.codecs import CODECS
from pipeline.target_model.options import TargetOptions
from pipeline.text import duration, size
from tests.capture.conftest import arguments, tree
from tests.conftest import LAYERS, assert_refused, run_cli, run_ok
from tests.tiny import make_conversations, make_target

Usage = namedtuple("Usage", "total used free")


def plan_arguments(target: Path, data: Path, cache: Path, **options: Any) -> list[str | Path]:
    return ["plan", *arguments(target, data, cache, **options)[1:]]


def real_size(cache: Path) -> int:
    return sum(map(len, tree(cache).values()))


def estimate(target: Path, data: Path, cache: Path, **options: Any) -> int:
    """`price` of what `arguments` captures, for a cache that is not there yet."""
    values = {"shard_tokens": 512, "batch_tokens": 256, **options}
    prepared = prepare(
        CaptureOptions(
            target=TargetOptions(target=str(target), dtype=values.pop("dtype", "float32")),
            data=DataOptions(data=(str(data),)),
            cache=cache,
            layer_ids=tuple(map(int, LAYERS.split(","))),
            **values,
        )
    )
    return price(prepared, "bf16", "bf16").total


@pytest.fixture
def no_weights(tmp_path, target_dir, monkeypatch) -> Path:
    """A target whose weights have a header and no values, and may not be loaded."""
    folder = tmp_path / target_dir.name
    shutil.copytree(target_dir, folder)
    with (folder / "model.safetensors").open("r+b") as file:
        end = 8 + int.from_bytes(file.read(8), "little")
        whole = file.seek(0, os.SEEK_END)
        file.truncate(end)
        file.truncate(whole)
    load = PreTrainedModel.from_pretrained.__func__

    def from_headers(cls: type, *args: Any, state_dict: dict | None = None, **kwargs: Any) -> Any:
        if state_dict is None or any(tensor.device.type != "meta" for tensor in state_dict.values()):
            raise AssertionError("weights were loaded")
        return load(cls, *args, state_dict=state_dict, **kwargs)

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(from_headers))
    return folder


def test_a_plan_says_what_a_capture_will_do_and_loads_and_writes_nothing(
    tmp_path, target_dir, no_weights, data_file, cache_dir
):
    before = set(tmp_path.rglob("*"))
    said = run_ok(*plan_arguments(no_weights, data_file, tmp_path / "cache"))
    assert set(tmp_path.rglob("*")) == before
    manifest = read_manifest(cache_dir)
    tokens, labels = manifest.num_tokens, manifest.num_last_rows
    lines = said.splitlines()
    assert lines[0] == "tiny-llama (LlamaForCausalLM, float32), layers [0, 2, 4], width 32"
    assert lines[1] == (
        f"{manifest.num_samples} samples, {tokens:,} tokens, {labels:,} of them supervised "
        f"({100 * labels / tokens:.0f}%)"
    )
    counts = [int(count) for count in re.findall(r"^ +\d+ to +\d+ +(\d+) +#*$", said, re.MULTILINE)]
    assert sum(counts) == manifest.num_samples
    assert len(counts) > 2
    assert "rows: captured 40, read 40" in lines
    assert re.search(r"^\d+ batches of at most 256 tokens, \d+\.\d% padding$", said, re.MULTILINE)
    assert f"{len(manifest.plan)} shards of at most 512 tokens" in lines
    for codec in CODECS:
        assert re.search(rf"^{codec}(\+int8)? +[\d,]+ +[\d.,]+ [kMGT]?B", said, re.MULTILINE)
    # By hand: id, mask, three layers of 32 bf16 numbers, and such a row of last hidden for every label.
    per_token = 4 + 1 + 3 * 32 * 2 + 32 * 2 * labels / tokens
    shown = int(re.search(r"^bf16 +(\d+) +.*\(this capture's\)$", said, re.MULTILINE)[1])
    assert per_token < shown < per_token + 40, "the rest is headers"
    assert f"free at {tmp_path / 'cache'}" in lines[-1]


def test_a_plan_says_which_training_the_data_allows(tmp_path, target_dir):
    """Two samples, of which the default share holds none out, and ten steps of training."""
    data = make_conversations(tmp_path / "chats.jsonl", 2, seed=5)
    result = run_cli(*plan_arguments(target_dir, data, tmp_path / "cache"))
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    said = "training, if the run's config keeps the defaults: about 10 optimiser steps, 10 epochs of about 1"
    assert f"{said}; 0 samples held out" in lines
    few, empty = [line for line in lines if line.startswith("warning: ")]
    assert "if the run's config keeps the defaults, fewer than 100 optimiser steps" in few
    assert "lower train.micro_batches_per_step from 128 to 1" in few
    assert "train.held_out = 0.05 leaves no sample held out of the cache's 2" in empty
    share = float(empty.rsplit("works is ", 1)[1])
    cache = tmp_path / "cache"
    run_ok(*arguments(target_dir, data, cache))
    out = [sample / 2**32 < share for sample in first_words(cache)]
    assert sorted(out) == [False, True]


def first_words(cache: Path) -> list[int]:
    """The first 32 bits of each sample's id, which decide on which side it is."""
    ids = CacheReader(cache).sample_ids
    return [int.from_bytes(row[:4].tobytes(), "big") for row in ids]


@pytest.mark.capability
def test_the_default_is_nf4_context_and_int8_last_hidden(tmp_path, target_dir, data_file):
    common = ["--target", target_dir, "--data", data_file, "--cache", tmp_path / "cache"]
    said = run_ok("plan", *common)
    (line,) = [line for line in said.splitlines() if line.endswith("(this capture's)")]
    assert line.startswith("nf4+int8 ")
    run_ok("capture", *common)
    kept = read_manifest(tmp_path / "cache").identity.features
    assert (kept.context_codec, kept.last_codec) == ("nf4", "int8")


def test_a_plan_shows_the_padding_that_the_forward_computes(tmp_path, target_dir):
    data = tmp_path / "data.jsonl"
    lengths = [8, 4, 2]
    rows = [{"input_ids": [5 + n] * n, "loss_mask": [1] * n} for n in lengths]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = run_ok(*plan_arguments(target_dir, data, tmp_path / "c", batch_tokens=24))
    assert f"1 batches of at most 24 tokens, {1 - 14 / 24:.1%} padding" in said
    said = run_ok(*plan_arguments(target_dir, data, tmp_path / "c", batch_tokens=2))
    assert "3 batches of at most 2 tokens, 0.0% padding" in said


def test_a_probe_runs_the_target_and_says_how_long_it_takes(tmp_path, target_dir, data_file):
    said = run_ok(*plan_arguments(target_dir, data_file, tmp_path / "cache"), "--probe")
    (line,) = [line for line in said.splitlines() if line.startswith("probe")]
    rate, time = re.fullmatch(
        r"probe: ([\d,]+) tokens/s on cpu, so (.+) for all [\d,]+ tokens by one process", line
    ).groups()
    tokens = int(re.search(r"([\d,]+) tokens, ", said)[1].replace(",", ""))
    assert time == duration(tokens / int(rate.replace(",", ""))) or tokens < int(rate.replace(",", ""))
    assert not (tmp_path / "cache").exists()


def test_a_probe_loads_weights_and_nothing_else_does(tmp_path, no_weights, data_file):
    result = run_cli(*plan_arguments(no_weights, data_file, tmp_path / "cache"), "--probe")
    assert_refused(result, 1, "can't be loaded", "weights were loaded")


@pytest.mark.parametrize(
    ("target", "options"),
    [
        ({"tie_word_embeddings": True}, {}),
        ({"tie_word_embeddings": False}, {"dtype": "bfloat16"}),
        ({"dtype": torch.float32}, {}),
        ({"dtype": torch.float32}, {"dtype": "bfloat16"}),
        ({"dtype": torch.float32}, {"dtype": "float16"}),
        ({}, {"shard_tokens": 2, "batch_tokens": 2}),
        ({}, {"shard_tokens": 100_000, "batch_tokens": 8192}),
        ({"hidden_size": 256, "head_dim": 64, "initializer_range": 0.05}, {"shard_tokens": 128}),
    ],
    ids=str,
)
def test_the_estimate_is_within_2_percent_of_the_finished_cache(tmp_path, data_file, target, options):
    folder = make_target(tmp_path / "target", "qwen3", **target)
    cache = tmp_path / "cache"
    expected = estimate(folder, data_file, cache, **options)
    run_ok(*arguments(folder, data_file, cache, **options))
    assert expected == pytest.approx(real_size(cache), rel=0.02)


def test_the_estimate_holds_for_a_shard_a_sample_and_many_of_them(tmp_path, target_dir):
    """Where headers, manifest and index weigh most."""
    data = make_conversations(tmp_path / "many.jsonl", count=150, seed=1)
    options = {"shard_tokens": 2, "batch_tokens": 2}
    expected = estimate(target_dir, data, tmp_path / "cache", **options)
    run_ok(*arguments(target_dir, data, tmp_path / "cache", **options))
    assert expected == pytest.approx(real_size(tmp_path / "cache"), rel=0.02)


@pytest.fixture
def small_disk(monkeypatch) -> list[int]:
    """A disk with as many bytes free as the list's one number says."""
    free = [0]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, free[0]))
    return free


def test_a_disk_that_cannot_hold_the_cache_is_refused_before_anything_is_written(
    tmp_path, target_dir, data_file, small_disk
):
    cache = tmp_path / "cache"
    need = estimate(target_dir, data_file, cache)
    for free, enough in ((need // 2, False), (need, False), (need * 2, True)):
        small_disk[0] = free
        for command in (arguments, plan_arguments):
            result = run_cli(*command(target_dir, data_file, cache))
            if enough:
                assert result.exit_code == 0, result.output
            else:
                assert_refused(result, 1, f"needs {size(need)} more", f"has {size(free)} free", "--force")
                assert not cache.exists()


def test_force_starts_all_the_same(tmp_path, target_dir, data_file, cache_dir, small_disk):
    assert "complete" in run_ok(*arguments(target_dir, data_file, tmp_path / "cache"), "--force")
    assert tree(tmp_path / "cache") == tree(cache_dir)
    assert "shards" in run_ok(*plan_arguments(target_dir, data_file, tmp_path / "other"), "--force")


def test_what_is_captured_already_needs_no_room(tmp_path, target_dir, data_file, cache_dir, small_disk):
    cache = tmp_path / "cache"
    shutil.copytree(cache_dir, cache)
    assert "reused" in run_ok(*arguments(target_dir, data_file, cache))
    said = run_ok(*plan_arguments(target_dir, data_file, cache))
    there = real_size(cache) - (cache / "manifest.json").stat().st_size  # which is written anew
    assert f"{size(there)} of the cache already written" in said


def test_free_space_is_asked_of_the_nearest_folder_that_exists(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or Usage(0, 0, 12))
    assert free_bytes(tmp_path / "not" / "yet") == 12
    assert asked == [tmp_path]


def test_a_plan_for_a_directory_of_another_capture_can_still_be_made(
    tmp_path, target_dir, data_file, cache_dir
):
    before = tree(cache_dir)
    assert "shards" in run_ok(*plan_arguments(target_dir, data_file, cache_dir, layers="1,2"))
    assert tree(cache_dir) == before


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.4, "0 s"), (59, "59 s"), (61, "1 min 01 s"), (3600, "1 h 00 min"), (7384, "2 h 03 min")],
)
def test_durations_for_people(seconds, said):
    assert duration(seconds) == said
    assert duration(3 * 86400) == "3.0 days"


@pytest.mark.parametrize(
    ("count", "said"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1.5e6, "1.5 MB"), (2.5e9, "2.5 GB"), (3.8e13, "38.00 TB")],
)
def test_sizes_for_people(count, said):
    assert size(count) == said
