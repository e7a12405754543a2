"""Samples with bad states: one row must not stop a night, and no reader may see it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from pipeline.cache import CacheReader, read_manifest
from pipeline.cache.codecs import get_codec
from pipeline.cache.manifest import shard_file
from pipeline.errors import CacheError
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
    """A broken embedding row, a dead layer and a small device."""
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


@pytest.mark.parametrize("share", ["0.1", "10%", " 10 % "[1:-1].replace(" ", "")])
def test_a_share_is_a_number_or_a_percentage(tmp_path, fp32_target, data, skipping, spoiled, share):
    options = {**SMALL, "bad_states": "skip", "max_bad_states": share}
    run_ok(*arguments(fp32_target, data, tmp_path / "cache", **options))
    assert tree(tmp_path / "cache") == tree(skipping)


@pytest.mark.parametrize("share", ["", "a tenth", "-0.1", "101%", "nan", "inf", "10%%", "1%0", "%"])
def test_another_share_is_a_usage_error(tmp_path, fp32_target, data, share):
    for command in ("capture", "plan"):
        words = arguments(fp32_target, data, tmp_path / "cache", max_bad_states=share)
        assert_refused(run_cli(command, *words[1:]), 2, "--max-bad-states expects", "0.1%", repr(share))
    assert not (tmp_path / "cache").exists()


def test_one_bad_sample_is_always_allowed(tmp_path, fp32_target, spoiled):
    data = write_rows(tmp_path / "rows.jsonl", {5: NAN}, count=20)
    result = run_cli(*arguments(fp32_target, data, tmp_path / "cache", **SMALL, bad_states="skip"))
    assert result.exit_code == 0, result.output
    assert "warning: skipped: layer 0 of the sample at row 6 of rows.jsonl holds NaN" in result.stderr
    assert "skipped   1 samples" in result.stdout
    assert len(CacheReader(tmp_path / "cache")) == 19


def test_where_every_sample_is_bad_there_is_no_cache(tmp_path, fp32_target, spoiled):
    data = write_rows(tmp_path / "rows.jsonl", dict.fromkeys(range(20), ZERO), count=20)
    options = {**SMALL, "bad_states": "skip", "max_bad_states": "100%"}
    result = run_cli(*arguments(fp32_target, data, tmp_path / "cache", **options))
    assert_refused(result, 1, "would hold no sample", "20")
    assert read_manifest(tmp_path / "cache").status == "incomplete"
    standardised = {**options, "context_codec": "nf4", "last_codec": "int8"}
    result = run_cli(*arguments(fp32_target, data, tmp_path / "other", **standardised))
    assert_refused(result, 1, "each of the 20 samples", "bad")


# Several processes, and what a stopped one leaves


def test_a_process_that_fails_and_one_that_skips_end_with_the_same_cache(
    tmp_path, fp32_target, data, skipping, spoiled
):
    cache = tmp_path / "cache"
    fails = arguments(fp32_target, data, cache, **SMALL)
    skips = arguments(fp32_target, data, cache, **SMALL, **SKIP)
    assert run_cli(*fails, "--worker", "0/2").exit_code == 1
    assert run_cli(*fails, "--worker", "1/2").exit_code == 1
    run_ok(*skips, "--worker", "1/2")
    assert tree(cache) == tree(skipping)


def test_shards_that_skip_are_taken_as_finished_whoever_completes(
    tmp_path, fp32_target, data, skipping, spoiled, monkeypatch
):
    """All shards are there: the last process asks its own maximum only."""
    cache = tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.cache.CacheWriter.finalise", lambda *_: None)
        run_ok(*arguments(fp32_target, data, cache, **SMALL, **SKIP))
    result = run_cli(*arguments(fp32_target, data, cache, **SMALL))
    assert_refused(result, 1, "4 of 60 samples are bad", "--max-bad-states")
    run_ok(*arguments(fp32_target, data, cache, **SMALL, max_bad_states="10%"))
    assert tree(cache) == tree(skipping)


def test_records_of_stopped_processes_keep_the_list(tmp_path, fp32_target, data, skipping, spoiled):
    """Too many for one run, so that every shard with a bad row ends a run of its own."""
    cache = tmp_path / "cache"
    for _ in range(6):
        result = run_cli(*arguments(fp32_target, data, cache, **SMALL, bad_states="skip", max_bad_states="0"))
        assert result.exit_code == 1
    run_ok(*arguments(fp32_target, data, cache, **SMALL, **SKIP))
    assert tree(cache) == tree(skipping)


def shards_with_and_without(cache: Path) -> tuple[int, int]:
    rows, shards = (index_of(cache)[name].to_pylist() for name in ("source_row", "shard"))
    bad = {shard for row, shard in zip(rows, shards, strict=True) if row in BAD}
    return min(bad), min(set(shards) - bad)


@pytest.mark.parametrize("lost", ["with", "without", "both", "index"])
def test_a_damaged_cache_is_completed_to_the_same_bytes(tmp_path, fp32_target, data, skipping, spoiled, lost):
    cache = shutil.copytree(skipping, tmp_path / "cache")
    one, other = shards_with_and_without(cache)
    names = {"with": [one], "without": [other], "both": [one, other], "index": []}[lost]
    for path in [cache / shard_file(shard) for shard in names] or [cache / "samples.arrow"]:
        path.write_bytes(path.read_bytes()[:-1])
    assert run_cli("verify", cache, "--repair").exit_code == 1
    shutil.rmtree(cache / "damaged")
    run_ok(*arguments(fp32_target, data, cache, **SMALL, **SKIP))
    assert tree(cache) == tree(skipping)


def test_a_record_with_an_impossible_list_is_no_record(tmp_path, fp32_target, data, skipping, spoiled):
    cache = tmp_path / "cache"
    result = run_cli(*arguments(fp32_target, data, cache, **SMALL, bad_states="skip", max_bad_states="0"))
    assert result.exit_code == 1
    (path,) = [p for p in sorted((cache / "progress").glob("0*.json")) if b"skipped" in p.read_bytes()][:1]
    record = json.loads(path.read_text())
    for lie in (
        {"bad luck": [0]},
        {"states not finite": [9999]},
        {"states not finite": [-1]},
        {"states not finite": [1, 1]},
        {"states not finite": [0], "states all zero": [0]},
    ):
        path.write_text(json.dumps({**record, "skipped": lie}))
        assert "all good" in run_ok("verify", cache)  # as if it were to be captured again
    run_ok(*arguments(fp32_target, data, cache, **SMALL, **SKIP))
    assert tree(cache) == tree(skipping)


# Figures and statistics


def test_statistics_pass_over_bad_samples(tmp_path, fp32_target, data, healthy, spoiled):
    codecs = {"context_codec": "nf4", "last_codec": "int8"}
    options = {**SMALL, **codecs}
    result = run_cli(*arguments(fp32_target, data, tmp_path / "two", **options))
    assert_refused(result, 1, "rows.jsonl", "--bad-states skip")
    for name in ("one", "two"):
        run_ok(*arguments(fp32_target, data, tmp_path / name, **options, **SKIP))
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert "all good" in run_ok("verify", tmp_path / "one")
    found = load_file(tmp_path / "one/statistics.safetensors")
    reader = CacheReader(healthy)
    chosen = np.unique(np.linspace(0, 59, 48).round().astype(int)).tolist()
    good = [i for i in chosen if reader.source_rows[i] not in BAD]
    assert len(good) < len(chosen)
    rows = torch.cat([reader.layer_view(i, 2)[1:] for i in good]).double()
    torch.testing.assert_close(found["context.2.mean"].double(), rows.mean(0), rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(
        found["context.2.deviation"].double(), rows.std(0, correction=0), rtol=1e-2, atol=1e-3
    )


def test_codecs_with_statistics_keep_all_other_bytes_where_no_measured_sample_is_bad(
    tmp_path, fp32_target, data, healthy, monkeypatch
):
    chosen = set(np.unique(np.linspace(0, 59, 48).round().astype(int)).tolist())
    rows = index_of(healthy)["source_row"].to_pylist()
    bad = next(row for number, row in enumerate(rows) if number not in chosen)
    ids = CacheReader(healthy).tokens(rows.index(bad))[0].long()

    def change(input_ids: Tensor, states: dict[int | str, Tensor]) -> None:
        for row, found in enumerate(input_ids[:, : len(ids)]):
            if torch.equal(found, ids):
                states[2][row, 1, 3] = float("nan")

    options = {**SMALL, "context_codec": "lm3", "last_codec": "int8"}
    run_ok(*arguments(fp32_target, data, tmp_path / "sound", **options))
    monkeypatch.setattr("capture.run.prove_target", lambda *_: {})
    after_each_forward(monkeypatch, change)
    run_ok(*arguments(fp32_target, data, tmp_path / "cache", **options, bad_states="skip"))
    assert read_manifest(tmp_path / "cache").skipped.source_row == (bad,)
    for number, row in enumerate(rows):
        got, want = rows_of(tmp_path / "cache", number), rows_of(tmp_path / "sound", number)
        if row == bad:
            assert all(set(got[name]) == {0} for name in got.keys() - {"input_ids", "loss_mask"})
        else:
            assert got == want


def test_figures_leave_bad_samples_out(skipping, healthy):
    figures = read_manifest(skipping).fidelity
    assert all(np.isfinite(value) for value in figures.values())
    ends = np.cumsum(index_of(healthy)["last_rows"].to_numpy())
    rows = index_of(healthy)["source_row"].to_pylist()
    checked = first = 0
    for labels in read_manifest(healthy).plan.last_rows:
        picks = sorted({(2 * i + 1) * labels // (2 * min(4, labels)) for i in range(min(4, labels))})
        owners = [int(np.searchsorted(ends, first + pick, side="right")) for pick in picks]
        checked += sum(rows[owner] not in BAD for owner in owners)
        first += labels
    assert checked < read_manifest(healthy).fidelity["teacher_tv_rows"]
    assert figures["teacher_tv_rows"] == checked


# Memory


CPU_SAYS = (
    "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"
)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(CPU_SAYS),
        MemoryError(),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: out of memory"),
    ],
    ids=["cpu", "python", "cublas", "cuda"],
)
def test_any_allocators_no_is_that_of_a_device(tmp_path, fp32_target, data, monkeypatch, error):
    def change(input_ids: Tensor, _states: dict) -> None:
        if bool((input_ids == HUGE).any()):
            raise error

    monkeypatch.setattr("capture.run.prove_target", lambda *_: {})
    after_each_forward(monkeypatch, change)
    run_ok(*arguments(fp32_target, data, tmp_path / "cache", **SMALL, bad_states="skip"))
    skipped = read_manifest(tmp_path / "cache").skipped
    assert (skipped.source_row, skipped.reason) == ((26,), ("does not fit the device",))


def test_memory_that_comes_back_costs_no_sample(tmp_path, fp32_target, data, healthy, monkeypatch):
    """Another program used it for a moment."""
    failed = []

    def change(input_ids: Tensor, _states: dict) -> None:
        if bool((input_ids == HUGE).any()) and len(input_ids) == 1 and not failed:
            failed.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("capture.run.prove_target", lambda *_: {})
    after_each_forward(monkeypatch, change)
    run_ok(
        *arguments(fp32_target, data, tmp_path / "cache", shard_tokens=128, batch_tokens=2, bad_states="skip")
    )
    assert failed
    assert not len(read_manifest(tmp_path / "cache").skipped)


def test_another_error_stops_the_run(tmp_path, fp32_target, data, monkeypatch):
    def change(input_ids: Tensor, _states: dict) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr("capture.run.prove_target", lambda *_: {})
    after_each_forward(monkeypatch, change)
    with pytest.raises(RuntimeError, match="mat1"):
        run_cli(*arguments(fp32_target, data, tmp_path / "cache", **SMALL, **SKIP))


def test_fp16_refuses_a_row_beyond_it_beside_one_with_infinity():
    rows = torch.tensor([[1.0, float("inf")], [1.0, 70000.0]])
    with pytest.raises(CacheError, match="70000"):
        get_codec("fp16").encode(rows)
    assert get_codec("fp16").encode(rows[:1])[""].tolist() == [[1.0, float("inf")]]
