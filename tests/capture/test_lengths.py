"""Captures of targets whose RoPE depends on the length, and of rows longer than the target's positions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import capture.prepare
from capture.options import CaptureOptions, DataOptions
from capture.prepare import PreparedCapture, prepare
from capture.shards.evidence import proof_batches
from pipeline.cache import CacheReader, read_manifest
from pipeline.rope import RopeLengths
from pipeline.target_model.options import TargetOptions
from tests.capture.conftest import arguments, tree
from tests.conftest import assert_refused, run_cli, run_ok
from tests.lengths import DYNAMIC, LIMIT, LONGROPE, ROPES, rope_target

LENGTHS = (40, 62, 64, 65, 66, 66, 80, 80, 50, 30, 64, 66)
WIDE = {"batch_tokens": 1000, "shard_tokens": 300, "layers": "1,3"}


def write_rows(path: Path, lengths: tuple[int, ...]) -> Path:
    generator = np.random.default_rng(3)
    rows = [
        {"input_ids": generator.integers(3, 250, n).tolist(), "loss_mask": [0, *[1] * (n - 1)]}
        for n in lengths
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", LENGTHS)


@pytest.fixture(scope="module", params=ROPES)
def target(request, tmp_path_factory) -> Path:
    return rope_target(tmp_path_factory.mktemp("rope") / request.param, request.param)


@pytest.fixture(scope="module")
def cache(target, rows, tmp_path_factory) -> Path:
    cache = tmp_path_factory.mktemp("lengths") / "cache"
    run_ok(*arguments(target, rows, cache, **WIDE))
    return cache


def prepared(target: Path, rows: Path, cache: Path, batch_tokens: int = 1000) -> PreparedCapture:
    return prepare(
        CaptureOptions(
            target=TargetOptions(target=str(target), dtype="float32", device="cpu"),
            data=DataOptions(data=(str(rows),)),
            cache=cache,
            batch_tokens=batch_tokens,
            shard_tokens=1000,
        )
    )


def test_every_captured_row_has_the_states_that_it_has_alone(cache, target):
    """In batches across the switch they were 10% to 90% off; what is left is bf16's rounding."""
    reader, worst = CacheReader(cache), 0.0
    assert len(reader) == len(LENGTHS)
    for i in range(len(reader)):
        model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()  # it has run nothing
        sample = reader.read(i)
        with torch.no_grad():
            ids = sample.input_ids.long()[None]
            output = model(input_ids=ids, output_hidden_states=True, use_cache=False)
        want = output.hidden_states[2][0], output.hidden_states[-1][0, :-1]
        got = sample.context[:, : model.config.hidden_size].float(), sample.last_hidden.float()
        for ours, own in zip(got, want, strict=True):
            worst = max(worst, ((ours - own).norm(dim=1) / own.norm(dim=1)).max().item())
    assert worst < 0.005, worst


def test_a_shard_captured_later_has_the_same_bytes(cache, target, rows, tmp_path):
    again = tmp_path / "cache"
    shutil.copytree(cache, again)
    shard = sorted((again / "shards").iterdir())[-1]
    shard.unlink()
    run_ok(*arguments(target, rows, again, **WIDE))
    assert tree(again) == tree(cache)


def test_a_cache_batched_across_the_switch_is_refused_with_the_reason(target, rows, tmp_path, monkeypatch):
    with monkeypatch.context() as before:  # as versions before this rule planned
        before.setattr(capture.prepare, "rope_lengths", lambda *_: RopeLengths())
        before.setattr("capture.run.prove_target", lambda *_: {})
        run_ok(*arguments(target, rows, tmp_path / "cache", **WIDE))
    result = run_cli(*arguments(target, rows, tmp_path / "cache", **WIDE))
    assert_refused(result, 1, "batched across a change of the target's RoPE", "not regarded", "64 tokens")
    assert "damaged" not in result.stderr


def test_rows_on_one_side_only_have_the_identity_that_they_had(target, tmp_path):
    short = write_rows(tmp_path / "short.jsonl", (20, 30, 40))
    found = prepared(target, short, tmp_path / "cache")
    assert "rope" not in found.identity.data.settings
    assert found.batching.batches == [range(3)]


def test_the_proof_uses_batches_on_both_sides_of_the_switch(target, rows, tmp_path):
    found = prepared(target, rows, tmp_path / "cache")
    lengths = found.data.facts.lengths[found.batching.order]
    used = [set(lengths[list(batch)].tolist()) for batch in proof_batches(found)]
    assert any(max(each) <= LIMIT for each in used)
    assert any(min(each) > LIMIT for each in used)
    assert {30} <= set().union(*used)  # the shortest
    assert {80} <= set().union(*used)  # the longest
    assert proof_batches(prepared(target, rows, tmp_path / "cache", batch_tokens=2)) == []


def test_a_plan_across_the_switch_does_not_pass_the_proof(rows, tmp_path, tmp_path_factory, monkeypatch):
    target = rope_target(tmp_path_factory.mktemp("rope") / "t", LONGROPE)
    monkeypatch.setattr(capture.prepare, "rope_lengths", lambda *_: RopeLengths())
    result = run_cli(*arguments(target, rows, tmp_path / "cache", **WIDE))
    assert_refused(result, 1, "changes when other rows share its batch", "Phi3")


# Longer than the target's positions


@pytest.fixture(scope="module")
def short_target(tmp_path_factory) -> Path:
    from tests.tiny import make_target

    folder = tmp_path_factory.mktemp("short") / "t"
    return make_target(folder, "llama", dtype=torch.float32, max_position_embeddings=LIMIT)


@pytest.mark.parametrize("command", ["capture", "plan", "preview"])
def test_rows_longer_than_the_positions_are_counted_in_one_line(short_target, rows, tmp_path, command):
    every = arguments(short_target, rows, tmp_path / "cache", **WIDE)[1:]
    few = ["--target", short_target, "--data", rows]
    result = run_cli(command, *(few if command == "preview" else every))
    assert result.exit_code == 0, result.output
    lines = [line for line in result.output.splitlines() if "positions" in line]
    assert len(lines) == 1
    assert all(part in lines[0] for part in ("6 of 12", "64 positions", "80 tokens", "--max-length 64"))


def test_rows_within_the_positions_are_no_news(tmp_path, rows):
    target = rope_target(tmp_path / "t", DYNAMIC)  # extended four times
    result = run_cli("plan", *arguments(target, rows, tmp_path / "cache", **WIDE)[1:])
    assert result.exit_code == 0
    assert "longer than" not in result.output


def test_only_the_first_process_speaks(short_target, rows, tmp_path):
    result = run_cli(*arguments(short_target, rows, tmp_path / "cache", **WIDE), "--worker", "1/2")
    assert result.exit_code == 0
    assert "positions" not in result.output
    assert "perplexity" not in result.output
    assert "proof.perplexity" in read_manifest(tmp_path / "cache").fidelity
