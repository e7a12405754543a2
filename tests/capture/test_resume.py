"""A directory that holds a capture already: reused, continued, mended or refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

import capture.example
from capture.data.conversations import TokenizedSample
from capture.options import CaptureOptions, DataOptions
from capture.prepare import prepare
from capture.target import HFDSparkTargetModel
from pipeline.cache import CacheReader, Manifest, read_manifest
from pipeline.cache.manifest import ShardFiles, write_manifest
from pipeline.errors import CacheError
from pipeline.target_model.load import open_target
from pipeline.target_model.options import TargetOptions
from tests.capture.conftest import arguments, tree
from tests.conftest import assert_refused, capture_arguments, run_cli, run_ok
from tests.processes import Dspark, die_in_the_middle
from tests.tiny import CHATML, make_conversations, make_target


def test_a_second_capture_reuses_without_a_forward(cache_dir, target_dir, data_file, tmp_path, monkeypatch):
    cache = tmp_path / "copy"
    shutil.copytree(cache_dir, cache)
    before = {p: p.stat().st_mtime_ns for p in cache.rglob("*")}

    def fail(*_args, **_kwargs):
        raise AssertionError("the target was run")

    monkeypatch.setattr(HFDSparkTargetModel, "states", fail)
    monkeypatch.setattr(torch.nn.Module, "__call__", fail)
    output = run_ok(*capture_arguments(target_dir, data_file, cache))
    assert "already complete, reused without running the target" in output
    assert {p: p.stat().st_mtime_ns for p in cache.rglob("*")} == before


def test_two_captures_give_the_same_bytes(cache_dir, target_dir, data_file, tmp_path):
    run_ok(*capture_arguments(target_dir, data_file, tmp_path / "again"))
    assert tree(tmp_path / "again") == tree(cache_dir)
    assert run_ok("verify", tmp_path / "again").strip().endswith("all good")


def test_a_killed_capture_continues_to_the_same_bytes(tmp_path, target_dir):
    data = make_conversations(tmp_path / "chats.jsonl", count=70, seed=2)
    small = {"shard_tokens": 64, "batch_tokens": 64}
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    dspark = Dspark(tmp_path / "out", *arguments(target_dir, data, killed, **small))
    assert dspark.wait_until(lambda: list(killed.glob("progress/00000.json"))), dspark.err
    dspark.send(signal.SIGKILL)
    assert dspark.wait() == -signal.SIGKILL

    manifest = read_manifest(killed)
    assert manifest.status == "incomplete"
    done = sorted((killed / "progress").glob("[0-9]*.json"))
    assert 1 <= len(done) < len(manifest.plan)
    with pytest.raises(CacheError, match="incomplete"):
        CacheReader(killed)
    first = killed / "shards" / "00000.safetensors"
    stamp = first.stat().st_mtime_ns

    output = run_ok(*arguments(target_dir, data, killed, **small))
    assert ": complete" in output
    assert first.stat().st_mtime_ns == stamp, "a finished shard was captured again"
    run_ok(*arguments(target_dir, data, whole, **small))
    ours, theirs = tree(killed), tree(whole)
    listed = {record.file for record in read_manifest(whole).all_files()} | {"manifest.json"}
    assert listed == set(theirs)
    assert {name: ours[name] for name in listed} == theirs


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("manifest.json", 1),
        ("samples.arrow", 1),
        ("frozen.safetensors", 1),
        ("00001.safetensors", 1),
        ("00001.json", 1),
        ("manifest.json", 2),
    ],
)
def test_killed_in_the_middle_of_a_file_leaves_nothing_behind(
    tmp_path, target_dir, data_file, cache_dir, name, call
):
    cache = tmp_path / "killed"
    command = capture_arguments(target_dir, data_file, cache)
    dspark = Dspark(tmp_path / "out", *command, before=die_in_the_middle, DIE_IN=name, DIE_AT=str(call))
    assert dspark.wait() == -signal.SIGKILL, dspark.err
    assert f".{name}" in [p.name.split("~")[0] for p in cache.rglob(".*.partial")]
    assert len(list(cache.rglob(name))) == call - 1
    run_ok(*command)
    CacheReader(cache).check_shards()
    assert sorted(tree(cache)) == sorted(tree(cache_dir))
    assert tree(cache) == tree(cache_dir)


def incomplete(manifest: Manifest) -> Manifest:
    """The manifest as it was before the last shard."""
    return dataclasses.replace(manifest, status="incomplete", shards=ShardFiles(), files=())


def test_a_damaged_progress_record_or_shard_is_captured_again(tmp_path, target_dir, data_file, cache_dir):
    cache = tmp_path / "cache"
    shutil.copytree(cache_dir, cache)
    manifest = read_manifest(cache)
    table = zip(manifest.shards.bytes, manifest.shards.sha256, strict=True)
    records = [
        {"file": f"shards/{number:05d}.safetensors", "bytes": size, "sha256": digest}
        for number, (size, digest) in enumerate(table)
    ]
    assert len(records) >= 3
    (cache / "progress").mkdir()
    for number, record in enumerate(records):
        (cache / "progress" / f"{number:05d}.json").write_text(json.dumps(record))
    write_manifest(cache, incomplete(manifest))
    (cache / "progress" / "00000.json").write_text('{"file": "shards/0')
    os.truncate(cache / records[1]["file"], 100)
    (cache / records[2]["file"]).unlink()
    run_ok(*capture_arguments(target_dir, data_file, cache))
    assert tree(cache) == tree(cache_dir)


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_complete_cache_is_not_called_complete(tmp_path, target_dir, data_file, cache_dir, damage):
    """The reader says `capture again`: doing so mends the cache, or says what else to do."""
    cache = tmp_path / "cache"
    shutil.copytree(cache_dir, cache)
    shard = cache / "shards" / "00001.safetensors"
    shard.unlink() if damage == "missing" else os.truncate(shard, 100)
    result = run_cli(*capture_arguments(target_dir, data_file, cache))
    if result.exit_code == 0:
        assert tree(cache) == tree(cache_dir)
    else:
        assert_refused(result, 1, "00001.safetensors")


# Another capture in the same directory


def assert_names_both(result: Result, cache: Path, field: str, ours: Any, theirs: Any = None) -> None:
    """The refusal names the field, what the cache holds and what was asked for instead."""
    held: Any = dataclasses.asdict(read_manifest(cache).identity)
    for name in field.split("."):
        held = held[name]
    assert held == ours != theirs
    assert_refused(result, 1, f"{field}: {ours} against {'' if theirs is None else theirs}", "--cache")


@pytest.mark.parametrize(
    ("change", "field", "ours", "theirs"),
    [
        ({"layers": "0,2,3"}, "features.layer_ids", (0, 2, 4), (0, 2, 3)),
        ({"max_length": 40}, "data.settings.max_length", "4096", "40"),
        ({"shard_tokens": 256}, "shard_tokens", 512, 256),
        ({"batch_tokens": 128}, "batch_tokens", 256, 128),
        ({"dtype": "float16"}, "target.dtype", "float32", "float16"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_setting_in_the_same_directory_is_refused(
    cache_dir, target_dir, data_file, change, field, ours, theirs
):
    before = tree(cache_dir)
    if field == "target.dtype":
        ours = read_manifest(cache_dir).identity.target.dtype  # bfloat16 where the processor has it
    result = run_cli(*arguments(target_dir, data_file, cache_dir, **change))
    assert_names_both(result, cache_dir, field, ours, theirs)
    assert tree(cache_dir) == before


def test_other_data_or_another_target_in_the_same_directory_is_refused(
    tmp_path, cache_dir, target_dir, data_file
):
    before, held = tree(cache_dir), read_manifest(cache_dir).identity
    other = make_conversations(tmp_path / data_file.name, count=40, seed=9)
    result = run_cli(*capture_arguments(target_dir, other, cache_dir))
    ids = [sample.sample_id for sample in load_as(target_dir, other)]
    assert_names_both(result, cache_dir, "data.sha256", held.data.sha256, None)
    assert hashlib.sha256(b"".join(ids)).hexdigest() in result.stderr
    twin = make_target(tmp_path / target_dir.name, seed=1)  # same shape and name, other weights
    result = run_cli(*capture_arguments(twin, data_file, cache_dir))
    theirs = open_target(TargetOptions(target=str(twin), dtype="float32")).identity().weights
    assert_names_both(result, cache_dir, "target.weights", held.target.weights, theirs)
    assert "target.hidden_size" not in result.stderr
    assert tree(cache_dir) == before


def load_as(target: Path, data: Path) -> list[TokenizedSample]:
    """Samples of a file in the order of a cache of it."""
    prepared = prepare(
        CaptureOptions(
            target=TargetOptions(target=str(target), dtype="float32"),
            data=DataOptions(data=(str(data),)),
            cache=data.parent / "nowhere",
            batch_tokens=256,
            shard_tokens=512,
        )
    )
    return [prepared.data[int(i)] for i in prepared.batching.order]


def test_another_chat_template_in_the_same_directory_is_refused(tmp_path, cache_dir, target_dir, data_file):
    before, held = tree(cache_dir), read_manifest(cache_dir).identity
    template = tmp_path / "template.jinja"
    for text in (CHATML + "{# the same text #}", CHATML.replace("<|im_end|>", "<|im_end|> ")):
        template.write_text(text)
        result = run_cli(*arguments(target_dir, data_file, cache_dir, chat_template=template))
        assert_names_both(
            result, cache_dir, "tokenizer.chat_template_sha256", held.tokenizer.chat_template_sha256
        )
        assert ("data.sha256" in result.stderr) == ("#" not in text), "other samples only where the text is"
    assert tree(cache_dir) == before


def test_an_incomplete_cache_of_another_capture_is_refused_too(tmp_path, cache_dir, target_dir, data_file):
    cache = tmp_path / "cache"
    shutil.copytree(cache_dir, cache)
    write_manifest(cache, incomplete(read_manifest(cache)))
    result = run_cli(*arguments(target_dir, data_file, cache, layers="1,2"))
    assert_refused(result, 1, "features.layer_ids", "(0, 2, 4)", "(1, 2)")


def test_a_directory_of_something_else_is_left_alone(tmp_path, target_dir, data_file):
    (tmp_path / "thesis.txt").write_text("precious")
    assert_refused(run_cli(*capture_arguments(target_dir, data_file, tmp_path)), 1, "not empty")
    assert tree(tmp_path) == {"thesis.txt": b"precious"}


def test_a_file_where_the_cache_should_be_is_refused(tmp_path, target_dir, data_file):
    (tmp_path / "cache").write_text("precious")
    result = run_cli(*capture_arguments(target_dir, data_file, tmp_path / "cache"))
    assert result.exit_code in (1, 2)
    assert_refused(result, result.exit_code, str(tmp_path / "cache"))
    assert (tmp_path / "cache").read_text() == "precious"


@pytest.fixture
def example_is_tiny(monkeypatch, target_dir, data_file):
    monkeypatch.setattr(capture.example, "example_target", lambda: target_dir)
    monkeypatch.setattr(capture.example, "EXAMPLE_DATA", data_file)


@pytest.mark.capability
@pytest.mark.usefixtures("example_is_tiny")
def test_the_example_is_captured_and_reused_without_options(tmp_path):
    cache = tmp_path / "example"
    assert ": complete" in run_ok("capture", "--cache", cache)
    assert read_manifest(cache).identity.features.layer_ids == (1, 2, 3)
    assert "already complete" in run_ok("capture", "--cache", cache)


@pytest.mark.capability
@pytest.mark.usefixtures("example_is_tiny")
def test_the_example_with_another_setting_is_refused(tmp_path):
    cache = tmp_path / "example"
    run_ok("capture", "--cache", cache)
    assert_refused(run_cli("capture", "--cache", cache, "--max-length", "40"), 1, "data.settings.max_length")


@pytest.mark.usefixtures("example_is_tiny")
def test_a_cache_named_alone_is_reused_and_described(tmp_path, fp32_target, few):
    """`make train CACHE=mine` trains from what is there; the command says what that is."""
    run_ok(*arguments(fp32_target, few, tmp_path / "mine"))
    said = run_ok("capture", "--cache", tmp_path / "mine")
    assert "already complete" in said
    assert f"{fp32_target.name} (Qwen3ForCausalLM" in said
