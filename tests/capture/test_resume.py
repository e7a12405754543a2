"""A directory that holds a capture already: reused, continued, mended or refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import capture.example
from capture.target import HFDSparkTargetModel
from pipeline.cache import CacheReader, read_manifest
from tests.capture.conftest import arguments, tree
from tests.conftest import assert_refused, capture_arguments, run_cli, run_ok
from tests.tiny import make_conversations, make_target

REPOSITORY = Path(__file__).parents[2]


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


def subprocess_environment() -> dict[str, str]:
    # The same thread count as this process: other sums, other bytes.
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def test_a_killed_capture_continues_to_the_same_bytes(tmp_path, target_dir):
    data = make_conversations(tmp_path / "chats.jsonl", count=70, seed=2)
    small = {"shard_tokens": 64, "batch_tokens": 64}
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    command = [sys.executable, "-m", "pipeline", *map(str, arguments(target_dir, data, killed, **small))]
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=subprocess_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        while not list(killed.glob("progress/00000.json")):
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.005)
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL

    manifest = read_manifest(killed)
    assert manifest.status == "incomplete"
    done = sorted((killed / "progress").glob("[0-9]*.json"))
    assert 1 <= len(done) < len(manifest.plan)
    assert_refused(run_cli("verify", killed), 1, "incomplete")
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


KILLED_WHILE_WRITING = """
import os, signal, sys
import pipeline.cache.writer as writer
real, calls = writer.save_file, []

def save_half(tensors, path, *rest, **options):
    calls.append(path)
    real(tensors, path, *rest, **options)
    if len(calls) == int(sys.argv[1]):
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

writer.save_file = save_half
from pipeline.cli import cli
cli(sys.argv[2:])
"""


@pytest.mark.parametrize("call", [1, 3], ids=["frozen", "shard"])
def test_killed_in_the_middle_of_a_file_leaves_nothing_behind(
    tmp_path, target_dir, data_file, cache_dir, call
):
    cache = tmp_path / "killed"
    command = list(map(str, capture_arguments(target_dir, data_file, cache)))
    result = subprocess.run(
        [sys.executable, "-c", KILLED_WHILE_WRITING, str(call), *command],
        cwd=REPOSITORY,
        env=subprocess_environment(),
        capture_output=True,
        check=False,
    )
    assert result.returncode == -signal.SIGKILL, result.stderr.decode()
    run_ok(*command)
    CacheReader(cache).check_shards()
    assert sorted(tree(cache)) == sorted(tree(cache_dir))
    assert tree(cache) == tree(cache_dir)


def test_a_damaged_progress_record_or_shard_is_captured_again(tmp_path, target_dir, data_file, cache_dir):
    cache = tmp_path / "cache"
    shutil.copytree(cache_dir, cache)
    manifest = json.loads((cache / "manifest.json").read_text())
    table = zip(manifest["shards"]["bytes"], manifest["shards"]["sha256"], strict=True)
    records = [
        {"file": f"shards/{number:05d}.safetensors", "bytes": size, "sha256": digest}
        for number, (size, digest) in enumerate(table)
    ]
    assert len(records) >= 3
    (cache / "progress").mkdir()
    for number, record in enumerate(records):
        (cache / "progress" / f"{number:05d}.json").write_text(json.dumps(record))
    (cache / "manifest.json").write_text(
        json.dumps(
            {
                **manifest,
                "status": "incomplete",
                "files": [],
                "fidelity": {},
                "shards": {"bytes": [], "sha256": []},
            }
        )
    )
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


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"layers": "0,2,3"}, "features.layer_ids"),
        ({"max_length": 40}, "data.settings.max_length"),
        ({"shard_tokens": 256}, "shard_tokens"),
        ({"batch_tokens": 128}, "batch_tokens"),
        ({"dtype": "float16"}, "target.dtype"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_another_setting_in_the_same_directory_is_refused(cache_dir, target_dir, data_file, change, field):
    before = tree(cache_dir)
    assert_refused(run_cli(*arguments(target_dir, data_file, cache_dir, **change)), 1, field, "--cache")
    assert tree(cache_dir) == before


def test_other_data_or_another_target_in_the_same_directory_is_refused(
    tmp_path, cache_dir, target_dir, data_file
):
    other = make_conversations(tmp_path / data_file.name, count=40, seed=9)
    assert_refused(run_cli(*capture_arguments(target_dir, other, cache_dir)), 1, "data.sha256")
    twin = make_target(tmp_path / target_dir.name, seed=1)  # same shape and name, other weights
    result = run_cli(*capture_arguments(twin, data_file, cache_dir))
    assert_refused(result, 1, "target.weights")
    assert "target.hidden_size" not in result.stderr


def test_an_incomplete_cache_of_another_capture_is_refused_too(tmp_path, cache_dir, target_dir, data_file):
    cache = tmp_path / "cache"
    shutil.copytree(cache_dir, cache)
    manifest = json.loads((cache / "manifest.json").read_text())
    (cache / "manifest.json").write_text(json.dumps({**manifest, "status": "incomplete", "files": []}))
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


@pytest.mark.usefixtures("example_is_tiny")
def test_the_example_is_captured_and_reused_without_options(tmp_path):
    cache = tmp_path / "example"
    assert ": complete" in run_ok("capture", "--cache", cache)
    assert read_manifest(cache).identity.features.layer_ids == (1, 2, 3)
    assert "already complete" in run_ok("capture", "--cache", cache)


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
