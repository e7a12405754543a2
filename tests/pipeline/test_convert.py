"""`dspark convert`: what it writes, stopped, shared and damaged, and that its source stays as it is."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import shutil
import signal
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import capture.run
import pipeline.cache.tools.convert
from pipeline.cache import CacheReader, read_manifest
from pipeline.cache.codecs import CODECS, Statistics, get_codec
from pipeline.cache.statistics import read_statistics
from pipeline.options import LAST_CODECS
from tests.conftest import LAYERS, assert_refused, capture_arguments, run_cli, run_ok
from tests.pipeline.handmade import HandCache
from tests.pipeline.written import Sample, Writing, every_byte, make_identity, make_sample
from tests.processes import Dspark, die_at, die_in_the_middle, finished_shards, leftovers

CODEC_NAMES = tuple(CODECS)
SMALLER = ("--context-codec", "nf4", "--last-codec", "int8")
# Relative error of a row that was encoded once more; random states of 32 channels fill one group by half.
ERRORS = {
    "bf16": 0.0,
    "fp32": 0.0,
    "fp16": 1e-3,
    "fp8": 0.04,
    "int8": 0.012,
    "nf4": 0.2,
    "lm3": 0.4,
}
Usage = namedtuple("Usage", "total used free")


def state(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Every entry below a directory: what it is, when it was written, what it holds."""
    return {
        p.relative_to(folder).as_posix(): (p.lstat().st_ino, p.lstat().st_mtime_ns, p.read_bytes())
        if p.is_file()
        else (p.lstat().st_ino, p.lstat().st_mtime_ns, b"")
        for p in [folder, *folder.rglob("*")]
    }


@pytest.fixture(autouse=True)
def source_stays_as_it_is(cache_dir):
    before = state(cache_dir)
    yield
    assert state(cache_dir) == before


@pytest.fixture(scope="module")
def stored(tmp_path_factory, cache_dir) -> Callable[[str], Path]:
    """The cache with some codec; the last hidden state has it too where it may."""
    folder, made = tmp_path_factory.mktemp("stored"), {"bf16": cache_dir}

    def make(name: str) -> Path:
        if name not in made:
            made[name] = folder / name
            run_ok("convert", cache_dir, made[name], *codecs(name))
        return made[name]

    return make


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache_dir) -> dict[str, bytes]:
    """What one undisturbed process makes of the cache."""
    cache = tmp_path_factory.mktemp("whole") / "cache"
    run_ok("convert", cache_dir, cache, *SMALLER)
    assert len(read_manifest(cache).plan) > 6
    return every_byte(cache)


def last_codec(name: str) -> str:
    return name if name in LAST_CODECS else "int8"


def codecs(name: str) -> list[str]:
    return ["--context-codec", name, "--last-codec", last_codec(name)]


def distance(one: Tensor, other: Tensor) -> float:
    """The largest relative difference of a row."""
    one, other = one.double(), other.double()
    return float(((one - other).norm(dim=1) / one.norm(dim=1)).max())


# What it writes


# What each codec keeps of a state, the least first.
PRECISION = ["lm3", "nf4", "fp8", "int8", "bf16", "fp16", "fp32"]


def test_every_codec_has_its_place_among_the_others():
    assert sorted(CODECS, key=lambda name: CODECS[name].order) == PRECISION
    assert len({codec.order for codec in CODECS.values()}) == len(CODECS)


@pytest.mark.parametrize(("before", "after"), list(itertools.product(CODEC_NAMES, CODEC_NAMES)))
def test_every_codec_becomes_every_other(tmp_path, stored, before, after):
    old = CacheReader(stored(before))
    result = run_cli("convert", old.path, tmp_path / "new", *codecs(after))
    assert result.exit_code == 0, result.output
    new = CacheReader(tmp_path / "new")
    features = new.manifest.identity.features
    assert (features.context_codec, features.last_codec) == (after, last_codec(after))
    if before == after:
        shards = [{n: d for n, d in every_byte(r.path).items() if n.startswith("shards")} for r in (old, new)]
        assert shards[0] == shards[1]
    finer = max(
        PRECISION.index(after) - PRECISION.index(before),
        PRECISION.index(last_codec(after)) - PRECISION.index(last_codec(before)),
    )
    assert result.stderr.count("warning: ") == (finer > 0)
    statistics = read_statistics(new.path, new.manifest.identity)
    for name, known in read_statistics(old.path, old.manifest.identity).items():
        if name in statistics:
            assert torch.equal(statistics[name].mean, known.mean)
            assert torch.equal(statistics[name].deviation, known.deviation)
    for i in range(0, len(old), 7):
        a, b = old.read(i), new.read(i)
        assert torch.equal(a.input_ids, b.input_ids)
        assert torch.equal(a.loss_mask, b.loss_mask)
        for column, layer in enumerate(old.layer_ids):
            own, got = (x.context[:, 32 * column : 32 * (column + 1)] for x in (a, b))
            check_rows(own, got, before, after, statistics.get(f"context.{layer}"))
        last = statistics.get("last_hidden")
        check_rows(a.last_hidden, b.last_hidden, last_codec(before), last_codec(after), last)


def check_rows(own: Tensor, got: Tensor, before: str, after: str, statistics: Statistics | None) -> None:
    if before == after:
        assert torch.equal(own, got)
        return
    expected = torch.empty_like(own)
    codec = get_codec(after)
    codec.decode(codec.encode(own, statistics), expected, statistics)
    assert torch.equal(expected, got)
    assert distance(own, got) <= ERRORS[after]


def test_dropping_layers_copies_what_stays(tmp_path, cache_dir):
    run_ok("convert", cache_dir, tmp_path / "new", "--layers", "0,4")
    old, new = every_byte(cache_dir), every_byte(tmp_path / "new")
    assert old.keys() == new.keys()
    for name, data in old.items():
        if name.startswith("shards/"):
            ours, theirs = load_file(tmp_path / "new" / name), load_file(cache_dir / name)
            assert theirs.keys() - ours.keys() == {"context.2"}
            assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
        elif name != "manifest.json":
            assert new[name] == data, name
    ours, theirs = (read_manifest(path) for path in (tmp_path / "new", cache_dir))
    assert ours.identity.features.layer_ids == (0, 4)
    assert (ours.plan, ours.rows) == (theirs.plan, theirs.rows)
    assert ours.identity.data == theirs.identity.data


def test_dropping_layers_keeps_codes_scales_and_statistics(tmp_path, stored):
    old = stored("nf4")
    run_ok("convert", old, tmp_path / "new", "--layers", "2")
    for path in sorted(old.glob("shards/*")):
        ours, theirs = load_file(tmp_path / "new/shards" / path.name), load_file(path)
        assert {name for name in ours if name.startswith("context")} == {"context.2", "context.2.scale"}
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
    ours, theirs = (load_file(c / "statistics.safetensors") for c in (tmp_path / "new", old))
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
    assert read_manifest(tmp_path / "new").fidelity["relative_error.context.2_mean"] == 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_it_writes_what_a_capture_with_these_codecs_and_statistics_would(
    tmp_path, target_dir, data_file, monkeypatch, dtype
):
    def captured(name: str, *options: str) -> Path:
        command = capture_arguments(target_dir, data_file, tmp_path / name)
        run_ok(*command, "--dtype", dtype, *options)
        return tmp_path / name

    raw = captured("raw")
    run_ok("convert", raw, tmp_path / "converted", *SMALLER)
    ours = read_manifest(tmp_path / "converted")
    statistics = read_statistics(tmp_path / "converted", ours.identity)
    monkeypatch.setattr(capture.run, "measure_statistics", lambda *given: statistics)
    theirs = read_manifest(captured("direct", *SMALLER))
    assert (ours.identity, ours.plan, ours.rows) == (theirs.identity, theirs.plan, theirs.rows)
    mine, direct = every_byte(tmp_path / "converted"), every_byte(tmp_path / "direct")
    assert mine.keys() == direct.keys()
    different = {name for name in mine if mine[name] != direct[name]}
    if dtype == "bfloat16":  # what was stored is what the target computed
        assert different == {"manifest.json"}
        return
    assert {name.partition("/")[0] for name in different} == {"manifest.json", "shards"}
    one, other = CacheReader(tmp_path / "converted"), CacheReader(tmp_path / "direct")
    for i in range(len(one)):
        a, b = one.read(i), other.read(i)
        for columns in range(0, 96, 32):
            part = slice(columns, columns + 32)
            assert distance(a.context[:, part], b.context[:, part]) <= ERRORS["nf4"]
        assert distance(a.last_hidden, b.last_hidden) <= ERRORS["int8"]


def write(path: Path, samples: list[Sample], limit: int = 10) -> Path:
    hidden = samples[0].last.shape[1]
    made = make_identity(tuple(samples[0].context), hidden=hidden, shard_tokens=limit)
    content = hashlib.sha256(b"".join(sample.name for sample in samples)).hexdigest()
    made = dataclasses.replace(made, data=dataclasses.replace(made.data, sha256=content))
    return Writing(samples, made).write(path)


def test_missing_statistics_are_those_of_48_samples_without_their_first_rows(tmp_path):
    generator = np.random.default_rng(0)
    masks = [[*generator.integers(0, 2, generator.integers(0, 9)).tolist(), 1, 1] for _ in range(70)]
    samples = [make_sample(mask, (0, 2), 4, seed=i) for i, mask in enumerate(masks)]
    for sample in samples:  # as attention sinks have it
        sample.last[0] = sample.context[2][0] = 1e6
    cache = write(tmp_path / "old", samples)
    run_ok("convert", cache, tmp_path / "new", *SMALLER)
    found = load_file(tmp_path / "new/statistics.safetensors")
    picks = [samples[round(i * 69 / 47)] for i in range(48)]
    rows = {f"context.{k}": torch.cat([s.context[k][1:] for s in picks]) for k in (0, 2)}
    rows["last_hidden"] = torch.cat([s.last[[r for r in s.rows if r > 0]] for s in picks])
    assert found.keys() == {f"{name}.{part}" for name in rows for part in ("mean", "deviation")}
    for name, values in rows.items():
        expected = values.double().numpy()
        np.testing.assert_allclose(found[f"{name}.mean"], expected.mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found[f"{name}.deviation"], expected.std(0), rtol=1e-5)


def test_where_first_rows_are_all_there_is_they_are_measured(tmp_path):
    samples = [make_sample([1, 1], (0,), 4, seed=i) for i in range(9)]
    run_ok("convert", write(tmp_path / "old", samples), tmp_path / "new", *SMALLER)
    found = load_file(tmp_path / "new/statistics.safetensors")
    expected = torch.stack([s.last[0] for s in samples]).double().mean(0)
    np.testing.assert_allclose(found["last_hidden.mean"], expected, rtol=1e-5, atol=1e-6)
    assert "all good" in run_ok("verify", tmp_path / "new")


def test_figures_are_those_of_a_few_label_rows_a_shard_and_the_sources_are_kept(tmp_path, cache_dir):
    run_ok("convert", cache_dir, tmp_path / "new", "--context-codec", "nf4", "--last-codec", "fp8")
    old, new = CacheReader(cache_dir), CacheReader(tmp_path / "new")
    head = old.frozen()["lm_head.weight"].double()
    errors: dict[str, list[float]] = {f"context.{layer}": [] for layer in old.layer_ids}
    errors |= {"last_hidden": [], "teacher": []}
    for _, members in itertools.groupby(range(len(old)), old.shard_of):
        rows = [(i, m) for i in members for m in range(old.num_last_rows(i))]
        for i, m in (rows[(2 * n + 1) * len(rows) // 8] for n in range(4)):
            a, b = old.read(i), new.read(i)
            position = int(a.last_positions[m])
            for column, layer in enumerate(old.layer_ids):
                part = slice(32 * column, 32 * column + 32)
                one, other = (
                    a.context[position : position + 1, part],
                    b.context[position : position + 1, part],
                )
                errors[f"context.{layer}"].append(distance(one, other))
            one, other = a.last_hidden[m], b.last_hidden[m]
            errors["last_hidden"].append(distance(one[None], other[None]))
            p, q = ((head @ x.double()).softmax(0) for x in (one, other))
            errors["teacher"].append(float((p - q).abs().sum() / 2))
    fidelity = read_manifest(tmp_path / "new").fidelity
    assert fidelity["teacher_tv_rows"] == len(errors["teacher"]) == 4 * len(old.manifest.plan)
    assert fidelity["teacher_tv_mean"] == pytest.approx(np.mean(errors.pop("teacher")), rel=1e-3)
    for name, values in errors.items():
        assert fidelity[f"relative_error.{name}_mean"] == pytest.approx(np.mean(values), rel=1e-3)
        assert fidelity[f"relative_error.{name}_p99"] == pytest.approx(np.percentile(values, 99), rel=1e-3)
    theirs = {f"source.{name}": value for name, value in old.manifest.fidelity.items()}
    assert {name: v for name, v in fidelity.items() if name.startswith("source.")} == theirs
    assert "source's teacher total variation: mean" in run_ok("inspect", tmp_path / "new")


def test_history_tells_every_conversion(tmp_path, cache_dir):
    run_ok("convert", cache_dir, tmp_path / "one", *SMALLER, "--layers", "0,4")
    run_ok("convert", tmp_path / "one", tmp_path / "two", "--context-codec", "lm3", "--layers", "4")
    raw, one, two = (read_manifest(p) for p in (cache_dir, tmp_path / "one", tmp_path / "two"))
    first = {"from": raw.checksum, "layers": "0,2,4", "context_codec": "bf16", "last_codec": "bf16"}
    second = {"from": one.checksum, "layers": "0,4", "context_codec": "nf4", "last_codec": "int8"}
    assert (raw.history, one.history, two.history) == ((), (first,), (first, second))
    assert two.fidelity["source.source.teacher_tv_mean"] == raw.fidelity["teacher_tv_mean"]
    shown = run_ok("inspect", tmp_path / "two")
    assert f"converted from {raw.checksum[:16]}: layers [0, 2, 4], bf16 context, bf16 last hidden" in shown
    assert f"converted from {one.checksum[:16]}: layers [0, 4], nf4 context, int8 last hidden" in shown
    assert json.loads(run_ok("inspect", tmp_path / "two", "--json"))["history"] == [first, second]
    assert "history" not in run_ok("inspect", cache_dir)
    assert "all good" in run_ok("verify", tmp_path / "two")


def test_a_cache_written_by_hand_is_converted(tmp_path):
    HandCache().save(tmp_path / "old")
    run_ok("convert", tmp_path / "old", tmp_path / "new", "--layers", "2", "--last-codec", "fp32")
    old, new = CacheReader(tmp_path / "old"), CacheReader(tmp_path / "new")
    for i in range(len(old)):
        a, b = old.read(i, (2,)), new.read(i)
        assert torch.equal(a.context, b.context)
        assert torch.equal(a.last_hidden, b.last_hidden)
    for path in (tmp_path / "old/target").iterdir():
        assert (tmp_path / "new/target" / path.name).read_bytes() == path.read_bytes()


def test_a_draft_trains_from_a_converted_cache(tmp_path, cache_dir):
    run_ok("convert", cache_dir, tmp_path / "new", *SMALLER, "--layers", "0,4")
    settings = {
        "draft.num_layers": 1,
        "draft.block_size": 3,
        "train.batch_tokens": 256,
        "train.anchors_per_batch": 64,
        "draft.markov_rank": 8,
        "train.max_steps": 2,
        "train.held_out": 0.2,
        "train.precision": "fp32",
    }
    given = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    run_ok("train", "--cache", tmp_path / "new", "--run", tmp_path / "run", "--device", "cpu", *given)
    config = json.loads((tmp_path / "run/latest/config.json").read_text())
    assert config["target_layer_ids"] == [0, 4]


# Stopped, shared, done already


@pytest.mark.parametrize("step", [1, 3, 8, 20, 33])
def test_killed_at_any_moment_it_continues_to_the_same_bytes(tmp_path, cache_dir, whole, step):
    command = ("convert", cache_dir, tmp_path / "new", *SMALLER)
    killed = Dspark(tmp_path / "out", *command, before=die_at, DIE_AT=str(step))
    assert killed.wait() == -signal.SIGKILL, killed.err
    assert (
        not (tmp_path / "new/manifest.json").exists() or read_manifest(tmp_path / "new").status != "complete"
    )
    assert ": complete" in run_ok(*command)
    assert every_byte(tmp_path / "new") == whole


def test_killed_in_the_middle_of_a_shard_it_keeps_the_others(tmp_path, cache_dir, whole):
    command = ("convert", cache_dir, tmp_path / "new", *SMALLER)
    killed = Dspark(
        tmp_path / "out", *command, before=die_in_the_middle, DIE_IN="00003.safetensors", DIE_AT="1"
    )
    assert killed.wait() == -signal.SIGKILL, killed.err
    assert finished_shards(tmp_path / "new") == ["00000.json", "00001.json", "00002.json"]
    shown = run_ok("inspect", tmp_path / "new")
    assert "run the same conversion again" in shown
    assert_refused(
        run_cli("convert", tmp_path / "new", tmp_path / "newer"), 1, "incomplete", "same conversion again"
    )
    assert not (tmp_path / "newer").exists()
    assert ": complete" in run_ok(*command)
    assert every_byte(tmp_path / "new") == whole


def take_your_time() -> None:
    """Let every shard take a while."""
    real = pipeline.cache.tools.convert.Filler.fill

    def fill(*given):
        time.sleep(0.3)
        return real(*given)

    pipeline.cache.tools.convert.Filler.fill = fill


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_keeps_finished_shards(tmp_path, cache_dir, whole, number):
    cache = tmp_path / "new"
    command = ("convert", cache_dir, cache, *SMALLER)
    stopped = Dspark(tmp_path / "out", *command, before=take_your_time)
    assert stopped.wait_until(lambda: finished_shards(cache)), stopped.err
    stopped.send(number)
    assert stopped.wait() == 128 + number
    assert [f"stopped by {number.name}" in line for line in stopped.errors] == [True]
    kept = {name: state(cache)[f"shards/{name[:5]}.safetensors"] for name in finished_shards(cache)}
    assert kept
    assert leftovers(cache) == []
    assert ": complete" in run_ok(*command)
    assert every_byte(cache) == whole
    assert all(state(cache)[f"shards/{name[:5]}.safetensors"] == found for name, found in kept.items())


def test_two_at_once_share_the_work(tmp_path, cache_dir, whole):
    command = ("convert", cache_dir, tmp_path / "new", *SMALLER)
    both = [Dspark(tmp_path / f"out{i}", *command, before=take_your_time) for i in range(2)]
    assert [each.wait() for each in both] == [0, 0], [each.err for each in both]
    assert any(": complete" in each.out for each in both)
    assert every_byte(tmp_path / "new") == whole


def test_another_may_finish_it_at_any_moment(tmp_path, cache_dir, whole, monkeypatch):
    command = ("convert", cache_dir, tmp_path / "new", *SMALLER)
    real = pipeline.cache.tools.convert.Worker

    def overtaken(*given):
        assert Dspark(tmp_path / "other", *command).wait() == 0
        return real(*given)

    monkeypatch.setattr(pipeline.cache.tools.convert, "Worker", overtaken)
    assert ": complete" in run_ok(*command)
    assert every_byte(tmp_path / "new") == whole


def begin(monkeypatch: pytest.MonkeyPatch, shards: int, *command: str | Path) -> None:
    """Convert only so many shards."""
    real = pipeline.cache.tools.convert.take_shards
    with monkeypatch.context() as patch:
        cut = lambda *given: itertools.islice(real(*given), shards)  # noqa: E731
        patch.setattr(pipeline.cache.tools.convert, "take_shards", cut)
        assert f"shards written by this process: {shards}; other processes write the rest" in run_ok(*command)


def test_a_complete_one_is_left_alone_and_a_lost_shard_is_written_again(tmp_path, cache_dir, whole):
    command = ("convert", cache_dir, tmp_path / "new", *SMALLER)
    run_ok(*command)
    before = state(tmp_path / "new")
    assert "already complete" in run_ok(*command)
    assert state(tmp_path / "new") == before
    for name in ("shards/00002.safetensors", "statistics.safetensors"):
        (tmp_path / "new" / name).unlink()
    assert ": complete" in run_ok(*command)
    assert every_byte(tmp_path / "new") == whole


def test_memory_does_not_grow_with_the_number_of_shards(tmp_path):
    size, tokens, layers = 1024, 1024, (0, 1, 2)  # 2 MiB a layer
    peaks = {}
    for count in (6, 18):
        samples = [make_sample([1] * tokens, layers, size, seed=i) for i in range(count)]
        cache = write(tmp_path / f"{count}", samples, limit=tokens)
        del samples
        command = ("convert", cache, tmp_path / f"{count}new", *SMALLER)
        work = Dspark(tmp_path / f"out{count}", *command, OMP_NUM_THREADS="1")
        assert work.wait() == 0, work.err
        peaks[count] = work.peak_bytes
    shard = (cache / "shards/00000.safetensors").stat().st_size
    assert peaks[18] - peaks[6] < 5 * shard, f"{peaks} for shards of {shard}"


# What it refuses


def copy(cache: Path, folder: Path) -> Path:
    shutil.copytree(cache, folder / "copy")
    return folder / "copy"


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)


def test_a_damaged_shard_is_refused_by_name_and_what_was_done_is_kept(tmp_path, cache_dir, whole):
    source = copy(cache_dir, tmp_path)
    shard = source / "shards/00003.safetensors"
    flip(shard)
    command = ("convert", source, tmp_path / "new", "--layers", "0,4")
    assert_refused(run_cli(*command), 1, "shards/00003.safetensors", "hash", "verify", "--repair")
    assert finished_shards(tmp_path / "new") == ["00000.json", "00001.json", "00002.json"]
    assert leftovers(tmp_path / "new") == []
    flip(shard)
    assert ": complete" in run_ok(*command)
    run_ok("convert", source, tmp_path / "whole", "--layers", "0,4")
    assert every_byte(tmp_path / "new") == every_byte(tmp_path / "whole")
    flip(shard)  # now where statistics are measured
    assert_refused(run_cli("convert", source, tmp_path / "other", *SMALLER), 1, "shards/00003.safetensors")
    assert not (tmp_path / "other/statistics.safetensors").exists()


@pytest.mark.parametrize("name", ["samples.arrow", "target/config.json", "target/frozen.safetensors"])
def test_other_damaged_files_are_refused_by_name(tmp_path, cache_dir, name):
    source = copy(cache_dir, tmp_path)
    flip(source / name)
    assert_refused(run_cli("convert", source, tmp_path / "new", *SMALLER), 1, name)


def test_damaged_statistics_are_refused_by_name(tmp_path, stored):
    source = copy(stored("nf4"), tmp_path)
    flip(source / "statistics.safetensors")
    assert_refused(run_cli("convert", source, tmp_path / "new", *SMALLER), 1, "statistics.safetensors")


def test_a_missing_shard_is_refused_by_name(tmp_path, cache_dir):
    source = copy(cache_dir, tmp_path)
    (source / "shards/00005.safetensors").unlink()
    assert_refused(run_cli("convert", source, tmp_path / "new", *SMALLER), 1, "shards/00005.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["context", "last"])
def test_a_source_that_holds_nonsense_is_refused(tmp_path, value, where):
    samples = [make_sample([0, 1, 1], (0,), 4, seed=i) for i in range(6)]
    (samples[4].context[0] if where == "context" else samples[4].last)[1, 2] = value
    result = run_cli("convert", write(tmp_path / "old", samples), tmp_path / "new", *SMALLER)
    assert_refused(
        result, 1, "shards/00001.safetensors", "context.0" if where == "context" else "last_hidden"
    )


def test_what_does_not_fit_a_codec_is_refused(tmp_path):
    samples = [make_sample([0, 1, 1], (0,), 4, seed=0)]
    samples[0].context[0][1, 2] = 1e5
    cache = write(tmp_path / "old", samples)
    assert_refused(run_cli("convert", cache, tmp_path / "new", "--context-codec", "fp16"), 1, "65504")


def test_wrong_requests_are_one_line(tmp_path, cache_dir):
    new = tmp_path / "new"
    for code, parts, options in [
        (1, ["holds layers [0, 2, 4]", "asks for 3"], ["--layers", "0,3"]),
        (2, ["strictly increasing"], ["--layers", "4,0"]),
        (2, ["integers separated by commas"], ["--layers", "a"]),
        (2, ["'gzip'", "--context-codec"], ["--context-codec", "gzip"]),
        (2, ["'nf4'", "--last-codec"], ["--last-codec", "nf4"]),
    ]:
        assert_refused(run_cli("convert", cache_dir, new, *options), code, *parts)
    assert_refused(run_cli("convert", tmp_path / "nothing", new), 1, "no cache at")
    assert_refused(run_cli("convert", cache_dir), 2, "DST")
    (tmp_path / "link").symlink_to(cache_dir)
    for same in (cache_dir, tmp_path / "link", cache_dir / "target" / ".."):
        assert_refused(run_cli("convert", cache_dir, same), 2, "is the cache to read")
    assert_refused(run_cli("convert", cache_dir, tmp_path / "link/inside"), 2, "is inside the cache")
    assert not new.exists()


def test_a_directory_that_holds_something_else_is_refused(tmp_path, cache_dir, stored):
    (tmp_path / "files").mkdir()
    (tmp_path / "files/mine").write_text("x")
    assert_refused(run_cli("convert", cache_dir, tmp_path / "files"), 1, "not empty")
    run_ok("convert", cache_dir, tmp_path / "new", *SMALLER)
    before = state(tmp_path / "new")
    again = run_cli("convert", cache_dir, tmp_path / "new", "--context-codec", "int8")
    assert_refused(again, 1, "features.context_codec: nf4 against int8")
    # The same features from another cache, and by a capture.
    other = run_cli("convert", stored("int8"), tmp_path / "new", *SMALLER)
    assert_refused(other, 1, "converted from", read_manifest(stored("int8")).checksum[:16])
    assert state(tmp_path / "new") == before


def test_a_capture_does_not_continue_a_conversion_nor_the_other_way(
    tmp_path, cache_dir, target_dir, data_file, monkeypatch
):
    begin(monkeypatch, 2, "convert", cache_dir, tmp_path / "new", "--layers", "0,4")
    command = capture_arguments(target_dir, data_file, tmp_path / "new")
    command[command.index(LAYERS)] = "0,4"
    assert_refused(run_cli(*command), 1, "was converted from", "not captured")
    source = copy(cache_dir, tmp_path)
    (source / "shards/00001.safetensors").unlink()
    assert_refused(run_cli("convert", cache_dir, source), 1, "was captured", "not converted from")


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, cache_dir, monkeypatch):
    command = ("convert", cache_dir, tmp_path / "new", *SMALLER)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, 1000))
    assert_refused(run_cli(*command), 1, "has 1 kB free", "--layers", "--force")
    assert not (tmp_path / "new").exists()
    assert ": complete" in run_ok(*command, "--force")
    assert "already complete" in run_ok(*command)


def test_the_price_is_what_it_takes(tmp_path, cache_dir):
    said = run_ok("convert", cache_dir, tmp_path / "new", *SMALLER)
    total = sum(map(len, every_byte(tmp_path / "new").values()))
    price = float(said.split(" kB in ")[0].split()[-1]) * 1000
    assert total == pytest.approx(price, rel=0.05)
