"""Samples with bad states: one row must not stop a night, and no reader may see it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.cache import CacheReader, read_manifest
from pipeline.cache.manifest import shard_file
from tests.capture.conftest import arguments, tree
from tests.capture.test_fill import after_each_forward
from tests.conftest import assert_refused, run_cli, run_ok
from tests.processes import finished_shards

SMALL = {"shard_tokens": 128, "batch_tokens": 64}
SKIP = {"bad_states": "skip", "max_bad_states": "20%"}
# The token ids that spoil a row: none of them is in a healthy one.
NAN, INFINITE, ZERO, HUGE = 200, 201, 202, 203
REASONS = {
    NAN: "states not finite",
    INFINITE: "states not finite",
    ZERO: "states all zero",
    HUGE: "does not fit the device",
}
BAD = {3: NAN, 11: ZERO, 17: INFINITE, 26: HUGE}
"""Bad rows of `data`: the id in each."""


def write_rows(path: Path, bad: dict[int, int], count: int = 60) -> Path:
    """Rows of random tokens, a few with one bad id in their middle."""
    generator = np.random.default_rng(0)
    with path.open("w") as file:
        for row in range(count):
            length = int(generator.integers(8, 24))
            ids = generator.integers(3, 30, length).tolist()
            if row in bad:
                ids[length // 2] = bad[row]
            mask = [0] * 3 + [1] * (length - 3)
            file.write(json.dumps({"input_ids": ids, "loss_mask": mask}) + "\n")
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", BAD)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory, fp32_target, data) -> Path:
    """The cache of a target that no id spoils."""
    cache = tmp_path_factory.mktemp("cache") / "healthy"
    run_ok(*arguments(fp32_target, data, cache, **SMALL))
    return cache


def spoil(input_ids: Tensor, states: dict[int | str, Tensor]) -> None:
    """What a broken embedding row, a dead layer and a small device do."""
    if bool((input_ids == HUGE).any()):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    for row, ids in enumerate(input_ids):
        (places,) = torch.where((ids == NAN) | (ids == INFINITE))
        for state in states.values():
            for place in places.tolist():
                state[row, place:] = float("nan") if ids[place] == NAN else float("-inf")
            if bool((ids == ZERO).any()):
                state[row] = 0


@pytest.fixture
def spoiled(monkeypatch):
    monkeypatch.setattr("capture.run.prove_target", lambda *_: {})
    after_each_forward(monkeypatch, spoil)


@pytest.fixture(scope="module")
def skipping(tmp_path_factory, fp32_target, data) -> Path:
    """A cache that skips every bad row."""
    cache = tmp_path_factory.mktemp("cache") / "skipping"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("capture.run.prove_target", lambda *_: {})
        after_each_forward(patch, spoil)
        run_ok(*arguments(fp32_target, data, cache, **SMALL, **SKIP))
    return cache


def index_of(cache: Path) -> pa.Table:
    with pa.memory_map(str(cache / "samples.arrow")) as mapped:
        return pa.ipc.open_file(mapped).read_all()


def rows_of(cache: Path, number: int) -> dict[str, bytes]:
    """The bytes of one sample in every tensor of its shard, by the index alone."""
    row = {name: column[0].as_py() for name, column in zip(*_row(cache, number), strict=True)}
    shard = load_file(cache / shard_file(row["shard"]))
    found = {}
    for name, tensor in shard.items():
        start, n = (
            (row["last_start"], row["last_rows"])
            if name.startswith("last_hidden")
            else (row["token_start"], row["length"])
        )
        found[name] = tensor[start : start + n].contiguous().view(torch.uint8).numpy().tobytes()
    return found


def _row(cache: Path, number: int) -> tuple[list[str], list[pa.ChunkedArray]]:
    table = index_of(cache).slice(number, 1)
    return table.schema.names, table.columns


def test_bad_rows_are_skipped_and_every_other_byte_stays(skipping, healthy, data):
    assert (skipping / "samples.arrow").read_bytes() == (healthy / "samples.arrow").read_bytes()
    manifest, sound = read_manifest(skipping), read_manifest(healthy)
    assert manifest.plan == sound.plan
    assert manifest.identity == sound.identity
    rows = index_of(healthy)["source_row"].to_pylist()
    for number, row in enumerate(rows):
        got, want = rows_of(skipping, number), rows_of(healthy, number)
        assert (got["input_ids"], got["loss_mask"]) == (want["input_ids"], want["loss_mask"])
        for name in got.keys() - {"input_ids", "loss_mask"}:
            if row in BAD:
                assert set(got[name]) == {0}, (row, name)
            else:
                assert got[name] == want[name], (row, name)


def test_the_manifest_lists_them_with_place_and_reason(skipping, healthy):
    values = json.loads((skipping / "manifest.json").read_text())
    rows = index_of(skipping)["source_row"].to_pylist()
    lengths = index_of(skipping)["length"].to_pylist()
    numbers = [number for number, row in enumerate(rows) if row in BAD]
    assert values["skipped"]["sample"] == numbers == sorted(numbers)
    assert values["skipped"]["source"] == [0] * len(BAD)
    assert values["skipped"]["source_row"] == [rows[number] for number in numbers]
    assert values["skipped"]["tokens"] == [lengths[number] for number in numbers]
    assert values["skipped"]["reason"] == [REASONS[BAD[rows[number]]] for number in numbers]
    counts = values["rows"]
    assert counts["read"] == 60
    assert counts["captured"] == 60 - len(BAD)
    assert counts["dropped: states not finite"] == 2
    assert counts["dropped: states all zero"] == counts["dropped: does not fit the device"] == 1
    assert counts["read"] == sum(n for name, n in counts.items() if name != "read")
    assert "skipped" not in json.loads((healthy / "manifest.json").read_text())


def test_a_reader_never_returns_them(skipping, healthy):
    reader, sound = CacheReader(skipping), CacheReader(healthy)
    assert len(reader) == len(reader.sample_ids) == len(reader.lengths) == len(sound) - len(BAD)
    assert not set(reader.source_rows.tolist()) & set(BAD)
    by_id = {sound.sample_id(i): sound.read(i) for i in range(len(sound))}
    for i in range(len(reader)):
        got = reader.read(i)
        want = by_id[got.sample_id]
        assert got.input_ids.tolist() == want.input_ids.tolist()
        assert torch.equal(got.context, want.context)
        assert torch.equal(got.last_hidden, want.last_hidden)
    manifest = reader.manifest
    assert manifest.num_samples == len(reader)
    assert manifest.num_tokens == int(reader.lengths.sum())
    assert manifest.num_last_rows == sum(map(reader.num_last_rows, range(len(reader))))


def test_failing_names_state_and_place_and_skipping_continues(tmp_path, fp32_target, data, skipping, spoiled):
    cache = tmp_path / "cache"
    result = run_cli(*arguments(fp32_target, data, cache, **SMALL))
    assert_refused(result, 1, " of rows.jsonl", "--bad-states skip", "same command")
    kept = {
        name: (cache / "shards" / f"{name[:5]}.safetensors").stat().st_mtime_ns
        for name in finished_shards(cache)
    }
    run_ok(*arguments(fp32_target, data, cache, **SMALL, **SKIP))
    for name, stamp in kept.items():
        assert (cache / "shards" / f"{name[:5]}.safetensors").stat().st_mtime_ns == stamp
    assert tree(cache) == tree(skipping)


def test_too_many_end_the_run_and_a_higher_share_continues(tmp_path, fp32_target, data, skipping, spoiled):
    cache = tmp_path / "cache"
    result = run_cli(*arguments(fp32_target, data, cache, **SMALL, bad_states="skip"))
    assert_refused(result, 1, "samples are bad", "--max-bad-states", "states not finite (row", "rows.jsonl")
    before = finished_shards(cache)
    assert before
    result = run_cli(*arguments(fp32_target, data, cache, **SMALL, bad_states="skip", max_bad_states="0.05"))
    assert_refused(result, 1, "4 of 60 samples are bad", "allows 3")
    run_ok(*arguments(fp32_target, data, cache, **SMALL, **SKIP))
    assert tree(cache) == tree(skipping)
