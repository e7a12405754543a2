"""`dspark inspect`: what a cache holds, one sample of it, and how far a capture is."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
from pathlib import Path

import click
import pyarrow as pa
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoTokenizer

from pipeline import process
from pipeline.cache import read_manifest
from pipeline.cache.manifest import ShardFiles, write_manifest
from pipeline.cache.progress.claims import Worker, WorkerState
from pipeline.cli import cli
from tests.conftest import assert_refused, run_cli, run_ok
from tests.pipeline.written import MASKS, every_byte, make_writing

SAMPLES = [*MASKS, *MASKS]


def index_of(cache: Path) -> list[dict]:
    with pa.memory_map(str(cache / "samples.arrow")) as mapped:
        return pa.ipc.open_file(mapped).read_all().to_pylist()


def facts_of(cache: Path, *options: str) -> dict:
    return json.loads(run_ok("inspect", cache, "--json", *options))


def test_the_facts_of_a_complete_cache(cache_dir):
    before = every_byte(cache_dir)
    facts, rows = facts_of(cache_dir, "--held-out", "0.4"), index_of(cache_dir)
    assert every_byte(cache_dir) == before
    manifest = json.loads(before["manifest.json"])
    assert facts["status"] == "complete"
    assert facts["identity"] == manifest["identity"]
    assert facts["fidelity"] == manifest["fidelity"]
    assert facts["rows"] == manifest["rows"]
    assert facts["samples"] == len(rows) == 40
    assert facts["tokens"] == sum(row["length"] for row in rows)
    assert facts["labels"] == sum(row["last_rows"] for row in rows)
    assert facts["supervised_share"] == facts["labels"] / facts["tokens"]
    assert facts["sources"] == [{"name": "chats.jsonl", "samples": 40}]
    sizes = {
        folder: sum(len(b) for n, b in before.items() if n.startswith(folder)) for folder in ("", "sh", "t")
    }
    assert facts["bytes"]["total"] == sizes[""]
    assert facts["bytes"]["shards"] == sizes["sh"]
    assert facts["bytes"]["target"] == sizes["t"]
    assert facts["bytes"]["index"] == len(before["samples.arrow"])
    assert facts["bytes"]["a_token"] == sizes["sh"] / facts["tokens"]
    held = [row for row in rows if int.from_bytes(row["sample_id"][:4], "big") < 0.4 * 2**32]
    assert 0 < len(held) < len(rows)
    assert facts["held_out"] == {
        "fraction": 0.4,
        "samples": len(held),
        "tokens": sum(row["length"] for row in held),
        "labels": sum(row["last_rows"] for row in held),
    }


def test_the_lines_of_a_complete_cache(cache_dir):
    said, facts = run_ok("inspect", cache_dir), facts_of(cache_dir)
    fidelity = facts["fidelity"]
    assert said.startswith(f"cache {cache_dir}: complete\n")
    for part in (
        "tiny-llama (LlamaForCausalLM, ",
        "layers [0, 2, 4], bf16 context (16 bits per value), bf16 last hidden (16 bits per value)",
        f"40 samples, {facts['tokens']:,} tokens, {facts['labels']:,} of them supervised",
        "chats.jsonl: 40 samples",
        "max_length 4096",
        "rows: captured 40, read 40",
        "at a fraction of 0.05",
        f"{facts['bytes']['a_token']:,.0f} bytes per token",
        f"teacher total variation: mean {fidelity['teacher_tv_mean']:.4g}, "
        f"p99 {fidelity['teacher_tv_p99']:.4g}, over {fidelity['teacher_tv_rows']:.0f} rows",
        f"error of context.4: mean {fidelity['relative_error.context.4_mean']:.4g}",
        "error of last_hidden: mean",
        "proof: padding_error",
    ):
        assert part in said
    assert "\x1b[" not in said


def test_a_complete_cache_without_some_shards_says_so(cache_dir, tmp_path):
    cache = shutil.copytree(cache_dir, tmp_path / "cache")
    (cache / "shards/00001.safetensors").unlink()
    (cache / "damaged").mkdir()
    (cache / "damaged/00001.safetensors").write_bytes(b"x" * 2000)
    said = run_ok("inspect", cache)
    assert "missing   1 shards" in said
    assert "2 kB in damaged/" in said


def test_nothing_and_a_damaged_index_are_refused_in_a_line(cache_dir, tmp_path):
    assert_refused(run_cli("inspect", tmp_path / "nowhere"), 1, "no cache")
    cache = shutil.copytree(cache_dir, tmp_path / "cache")
    os.truncate(cache / "samples.arrow", 100)
    assert_refused(run_cli("inspect", cache), 1, "samples.arrow is damaged")
    assert_refused(run_cli("inspect", cache, "--held-out", "2"), 2, "--held-out")


# One sample


def stored(cache: Path, row: dict) -> dict[str, torch.Tensor]:
    """A sample's own rows of every tensor of its shard."""
    shard = load_file(cache / f"shards/{row['shard']:05d}.safetensors")
    last = slice(row["last_start"], row["last_start"] + row["last_rows"])
    tokens = slice(row["token_start"], row["token_start"] + row["length"])
    return {name: tensor[last if name == "last_hidden" else tokens] for name, tensor in shard.items()}


def test_a_sample_by_its_hash_by_the_beginning_of_it_and_by_its_number(cache_dir):
    rows = index_of(cache_dir)
    whole = rows[7]["sample_id"].hex()
    expected = run_ok("inspect", cache_dir, "--sample", "#7")
    assert f"== sample #7 {whole}" in expected
    assert f"row {rows[7]['source_row'] + 1:,} of chats.jsonl, shard {rows[7]['shard']}, " in expected
    unique = next(n for n in range(1, 33) if sum(r["sample_id"].hex()[:n] == whole[:n] for r in rows) == 1)
    for length in (32, unique, unique + 1):
        assert run_ok("inspect", cache_dir, "--sample", whole[:length]) == expected


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("#40", "#0 to #39"),
        ("#-1", "#0 to #39"),
        ("#", "#0 to #39"),
        ("#" + "9" * 40, "#0 to #39"),
        ("xyz", "in hex"),
        ("", "in hex"),
        ("0" * 33, "in hex"),
        ("0123456789abcdef" * 2, "no hash"),
    ],
)
def test_a_sample_that_is_not_there_is_refused(cache_dir, text, part):
    assert_refused(run_cli("inspect", cache_dir, "--sample", text), 2, part)


def test_a_prefix_of_several_samples_is_refused(cache_dir):
    first = [row["sample_id"].hex()[0] for row in index_of(cache_dir)]
    several = next(digit for digit in first if first.count(digit) > 1)
    result = run_cli("inspect", cache_dir, "--sample", several)
    assert_refused(result, 2, f"{first.count(several)} samples", "give more")


def test_a_samples_text_is_its_tokens_with_the_supervised_ones_in_green(cache_dir):
    row = index_of(cache_dir)[2]
    tensors, tokenizer = stored(cache_dir, row), AutoTokenizer.from_pretrained(cache_dir / "target")
    arguments = ["inspect", str(cache_dir), "--sample", "#2"]
    said = CliRunner().invoke(cli, arguments, color=True).stdout
    ids, mask = tensors["input_ids"].tolist(), tensors["loss_mask"].tolist()
    assert tokenizer.decode(ids) in click.unstyle(said)
    green = "".join(re.findall(r"\x1b\[32m(.*?)\x1b\[0m", said, re.DOTALL))
    assert green == tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])
    assert click.unstyle(said) == run_ok(*arguments)


def test_a_samples_figures_are_those_of_its_stored_rows(cache_dir):
    row = index_of(cache_dir)[5]
    sample, tensors = facts_of(cache_dir, "--sample", "#5")["sample"], stored(cache_dir, row)
    assert sample["sample_id"] == row["sample_id"].hex()
    assert sample["input_ids"] == tensors["input_ids"].tolist()
    content = b"".join(n.to_bytes(4, "little") for n in sample["input_ids"]) + bytes(sample["loss_mask"])
    assert hashlib.sha256(content).hexdigest()[:32] == sample["sample_id"]
    names = {
        "layer 0": "context.0",
        "layer 2": "context.2",
        "layer 4": "context.4",
        "last hidden": "last_hidden",
    }
    assert sample["states"].keys() == names.keys()
    for name, tensor in names.items():
        got, rows = sample["states"][name], tensors[tensor].tolist()
        values = [value for values in rows for value in values]
        mean = math.fsum(values) / len(values)
        square = math.fsum(v * v for v in values) / len(values)
        channels = [
            math.sqrt(math.fsum(v * v for v in column) / len(rows)) for column in zip(*rows, strict=True)
        ]
        assert (got["rows"], got["min"], got["max"]) == (len(rows), min(values), max(values))
        assert got["mean"] == pytest.approx(mean, abs=1e-12)
        assert got["rms"] == pytest.approx(math.sqrt(square))
        assert got["deviation"] == pytest.approx(math.sqrt(square - mean * mean))
        assert got["largest_channel"] == channels.index(max(channels))
        assert got["largest_channel_rms"] == pytest.approx(max(channels))


def test_without_a_tokenizer_token_ids_are_shown(tmp_path):
    writing = make_writing(MASKS)
    cache = writing.write(tmp_path / "cache")
    said = run_ok("inspect", cache, "--sample", "#0")
    assert "token ids" in said
    first = writing.samples[0]
    assert " ".join(map(str, first.ids)) in " ".join(said.split())
    assert facts_of(cache, "--sample", "#0")["sample"]["text"] is None


# A running capture


def running(path: Path, done: int = 2) -> Path:
    """A capture of several shards of which the first ones are written."""
    writing = make_writing(SAMPLES)
    writer = writing.open(path)
    assert len(writing.plan) > done + 1
    for shard in range(done):
        writing.write_shard(writer, shard)
    return path


def worker_file(cache: Path, name: str, **values) -> None:
    state = WorkerState(
        **{"label": "0/2", "host": "node", "place": "elsewhere", "pid": 7, "started": None, **values}
    )
    (cache / "progress" / f"worker-{name}.json").write_text(json.dumps(dataclasses.asdict(state)))


def test_a_running_captures_progress_rate_and_time_left(tmp_path):
    cache = running(tmp_path / "cache")
    worker_file(cache, "aa-7-1", label="0/2", host="one", seconds=10.0, tokens=30)
    worker_file(cache, "aa-8-1", label="1/2", host="two", seconds=4.0, tokens=2)
    before = every_byte(cache)
    facts, plan = facts_of(cache), read_manifest(cache).plan
    progress = facts["progress"]
    assert (progress["shards_done"], facts["shards"]) == (2, len(plan))
    assert progress["tokens_done"] == plan.tokens[0] + plan.tokens[1]
    assert facts["tokens"] == sum(map(len, SAMPLES))
    assert progress["bytes_done"] == sum(len(d) for n, d in before.items() if n.startswith("shards/"))
    assert [(w["label"], w["host"], w["tokens_per_second"]) for w in progress["workers"]] == [
        ("0/2", "one", 3.0),
        ("1/2", "two", 0.5),
    ]
    assert progress["tokens_per_second"] == 3.5
    assert progress["seconds_left"] == (facts["tokens"] - progress["tokens_done"]) / 3.5
    said = run_ok("inspect", cache)
    assert f"2 of {len(plan)} shards, {progress['tokens_done']} of {facts['tokens']} tokens" in said
    assert "0/2 on one, process 7: 3 tokens/s" in said
    assert re.search(r"rate .* by 2 running, \d+ s left", said)
    assert every_byte(cache) == before


def test_a_worker_of_this_machine_counts_while_it_lives(tmp_path):
    cache = running(tmp_path / "cache")
    assert "no process is running" in run_ok("inspect", cache)
    worker_file(cache, "dead", place=process.place(), pid=2**22 + 1)
    with Worker(cache / "progress", "3/4"):
        (worker,) = facts_of(cache)["progress"]["workers"]
        assert (worker["label"], worker["pid"]) == ("3/4", os.getpid())
        assert "not known yet, 1 running" in run_ok("inspect", cache)
    assert facts_of(cache)["progress"]["workers"] == []


def test_a_shard_set_aside_is_not_finished_and_one_kept_is(tmp_path):
    cache = make_writing(MASKS).write(tmp_path / "cache")
    manifest = read_manifest(cache)
    (cache / "progress").mkdir()
    kept = {
        "bytes": [0, *manifest.shards.bytes[1:]],
        "sha256": list(manifest.shards.sha256),
    }
    (cache / "progress/kept.json").write_text(json.dumps(kept))
    write_manifest(cache, dataclasses.replace(manifest, status="incomplete", shards=ShardFiles(), files=()))
    (cache / "shards/00001.safetensors").unlink()
    assert facts_of(cache)["progress"]["shards_done"] == len(manifest.plan) - 2


@pytest.mark.parametrize(
    "garbage", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 4000, b'{"label": 3}', b"x" * 10**6]
)
def test_garbage_among_the_progress_files_is_passed_over(tmp_path, garbage):
    cache = running(tmp_path / "cache")
    for name in (
        "worker-1.json",
        "kept.json",
        "target.json",
        "99999.json",
        "-1.json",
        "x.json",
        "00002.claim",
    ):
        (cache / "progress" / name).write_bytes(garbage)
    (cache / "shards" / "99999999999999999999.safetensors").write_bytes(garbage)
    (cache / "shards" / "00002.safetensors").symlink_to("nowhere")
    os.mkfifo(cache / "progress" / "worker-2.json")
    assert facts_of(cache)["progress"]["shards_done"] == 2
    assert run_cli("inspect", cache).exit_code == 0


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf, 1e-320])
def test_a_worker_that_says_nonsense_has_no_rate(tmp_path, seconds):
    cache = running(tmp_path / "cache")
    worker_file(cache, "a", seconds=seconds, tokens=2**48, host="\x1b[31mred\nline")
    progress = facts_of(cache)["progress"]
    assert (progress["tokens_per_second"], progress["seconds_left"]) == (0.0, None)
    assert progress["workers"][0]["host"] == "?[31mred?line"


@pytest.mark.parametrize("gone", ["progress", "shards", "samples.arrow"])
def test_what_vanished_is_not_missed(tmp_path, gone):
    cache = running(tmp_path / "cache")
    shutil.rmtree(cache / gone) if (cache / gone).is_dir() else (cache / gone).unlink()
    facts = facts_of(cache)
    assert facts["progress"]["shards_done"] == (2 if gone == "samples.arrow" else 0)
    assert ("sources" in facts) == (gone != "samples.arrow")
    assert "incomplete" in run_ok("inspect", cache)


def test_a_sample_of_an_incomplete_cache_is_refused(tmp_path):
    assert_refused(run_cli("inspect", running(tmp_path / "cache"), "--sample", "#0"), 1, "incomplete")


def test_a_capture_that_ends_meanwhile_is_shown_complete(tmp_path, monkeypatch):
    writing = make_writing(MASKS)
    cache = tmp_path / "cache"
    writer = writing.open(cache)
    import pipeline.cache.tools.inspect as module

    def ends(folder: Path) -> list[WorkerState]:
        writing.finish(writer)
        assert not folder.exists()
        return []

    monkeypatch.setattr(module, "live_workers", ends)
    facts = facts_of(cache)
    assert facts["status"] == "complete"
    assert "progress" not in facts
