"""What codecs standardise by: the figures, the file, and that no two processes ever use different ones."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.cache import CacheReader, read_manifest
from pipeline.cache.codecs import CODECS, Statistics
from pipeline.cache.manifest import FileRecord, write_manifest
from pipeline.cache.progress.finished import finished_files
from pipeline.cache.statistics import StateStatistics, read_statistics, standardised_states
from pipeline.cache.verify import verify_cache
from pipeline.errors import CacheError
from tests.pipeline.hostile import assert_refuses
from tests.pipeline.stored import HIDDEN, Stored, some_statistics, stored_cache, stored_identity
from tests.pipeline.written import every_byte, read_all

FILE = "statistics.safetensors"


def measured(*pieces: np.ndarray) -> Statistics:
    sums = StateStatistics()
    for piece in pieces:
        sums.add(torch.from_numpy(piece))
    return sums.result()


# The figures


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mean_and_deviation_are_numpys(dtype):
    generator = np.random.default_rng(0)
    rows = generator.normal(size=(301, 37)) * generator.lognormal(0, 1, 37) + 3 * generator.normal(size=37)
    rounded = torch.from_numpy(rows).to(dtype)
    sums = StateStatistics()
    for start, stop in ((0, 1), (1, 1), (1, 50), (50, 301)):
        sums.add(rounded[start:stop])
    got, exact = sums.result(), rounded.double().numpy()
    assert got.mean.dtype == got.deviation.dtype == torch.float32
    np.testing.assert_allclose(got.mean, exact.mean(axis=0), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(got.deviation, exact.std(axis=0), rtol=1e-6)


def test_a_large_mean_does_not_swallow_the_deviation():
    rows = 1e6 + np.random.default_rng(0).normal(size=(500, 3)).astype(np.float64)
    rows[:, 1] = rows[:, 1] / 1e3
    got = measured(rows[:7], rows[7:])
    np.testing.assert_allclose(got.mean, rows.mean(axis=0), rtol=1e-7)
    np.testing.assert_allclose(got.deviation[[0, 2]], rows.std(axis=0)[[0, 2]], rtol=1e-5)


def test_a_channel_that_never_moves_has_a_floor():
    """A hundredth of the median deviation: of an even number the lower of the two in the middle."""
    rows = np.random.default_rng(0).normal(size=(100, 6)) * [1, 0, 2, 3, 4, 0.001] + [5, 7, 0, 0, 0, 0]
    got = measured(rows.astype(np.float32))
    deviations = rows.astype(np.float32).astype(np.float64).std(axis=0)
    floor = 0.01 * np.sort(deviations)[2]
    np.testing.assert_allclose(got.deviation[[1, 5]], [floor, floor], rtol=1e-6)
    np.testing.assert_allclose(got.deviation[[0, 2, 3, 4]], deviations[[0, 2, 3, 4]], rtol=1e-6)
    assert got.mean[1] == 7


def test_states_that_never_move_at_all_can_be_stored():
    got = measured(np.full((10, 65), 3.0, dtype=np.float32))
    assert torch.equal(got.deviation, torch.full((65,), 2.0**-60))
    for codec in CODECS.values():
        out = torch.empty(10, 65, dtype=torch.bfloat16)
        codec.decode(codec.encode(torch.full((10, 65), 3.0), got), out, got)
        assert torch.allclose(out.float(), torch.tensor(3.0), rtol=0.01)


# The file


@pytest.mark.parametrize(
    ("context", "last", "expected"),
    [
        ("bf16", "bf16", []),
        ("fp8", "fp8", []),
        ("nf4", "fp8", ["context.0", "context.2"]),
        ("fp8", "int8", ["last_hidden"]),
        ("lm3", "int8", ["context.0", "context.2", "last_hidden"]),
    ],
)
def test_the_file_holds_what_the_codecs_need_and_is_listed(tmp_path, context, last, expected):
    cache, identity = stored_cache(tmp_path / "cache", context, last), stored_identity(context, last)
    assert standardised_states(identity) == expected
    listed = [record for record in read_manifest(cache).files if record.file == FILE]
    assert len(listed) == bool(expected)
    if not expected:
        assert not (cache / FILE).exists()
        return
    tensors = load_file(cache / FILE)
    assert tensors.keys() == {f"{state}.{part}" for state in expected for part in ("mean", "deviation")}
    for state, values in some_statistics(identity).items():
        assert torch.equal(tensors[f"{state}.mean"], values.mean)
        assert torch.equal(tensors[f"{state}.deviation"], values.deviation)
    assert listed[0].bytes == (cache / FILE).stat().st_size
    assert verify_cache(cache).problems == []


def test_nothing_is_measured_where_no_codec_needs_it(tmp_path):
    def fail() -> dict[str, Statistics]:
        raise AssertionError("measured")

    writer = Stored("fp8", "bf16").open(tmp_path / "cache")
    assert writer.statistics_written()
    assert writer.statistics(fail) == {}


def test_the_first_to_publish_decides_for_all(tmp_path):
    """Both measured, each something else."""
    writing = Stored("nf4", "int8")
    one, other = writing.open(tmp_path / "cache"), writing.open(tmp_path / "cache")
    first, second = (some_statistics(writing.identity, shift) for shift in (0.0, 1.0))
    assert not one.statistics_written()

    def measure() -> dict[str, Statistics]:
        """While this is under way, the other publishes."""
        assert_same(other.statistics(lambda: first), first)
        return second

    assert_same(one.statistics(measure), first)
    assert_same(other.statistics(measure), first)
    assert one.statistics_written()
    assert [p.name for p in (tmp_path / "cache").glob("*statistics*")] == [FILE]


def assert_same(got: dict[str, Statistics], expected: dict[str, Statistics]) -> None:
    assert got.keys() == expected.keys()
    for state, values in expected.items():
        assert torch.equal(got[state].mean, values.mean)
        assert torch.equal(got[state].deviation, values.deviation)


# Files that lie

Tensors = dict[str, Tensor]
CHANGES: dict[str, Callable[[Tensors], object]] = {
    "NaN": lambda t: t["context.0.mean"].__setitem__(3, float("nan")),
    "infinity": lambda t: t["context.0.mean"].__setitem__(3, float("-inf")),
    "infinite deviation": lambda t: t["context.0.deviation"].__setitem__(0, float("inf")),
    "huge": lambda t: t["last_hidden.mean"].__setitem__(0, -(2.0**61)),
    "zero": lambda t: t["last_hidden.deviation"].__setitem__(0, 0.0),
    "negative": lambda t: t["context.2.deviation"].__setitem__(-1, -1.0),
    "another width": lambda t: t.update({"context.2.mean": torch.zeros(HIDDEN + 1)}),
    "another dtype": lambda t: t.update({"context.2.mean": torch.zeros(HIDDEN).double()}),
    "one missing": lambda t: t.pop("context.2.mean"),
    "one too many": lambda t: t.update({"context.4.mean": torch.zeros(HIDDEN)}),
}


def a_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def replaced_by(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def replace(path: Path) -> None:
        path.unlink()
        make(path)

    return replace


THINGS: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "a link": a_link,
    "a dangling link": replaced_by(lambda path: path.symlink_to("nowhere")),
    "a folder": replaced_by(Path.mkdir),
    "a pipe": replaced_by(os.mkfifo),
    "empty": lambda path: os.truncate(path, 0),
    "cut": lambda path: os.truncate(path, 100),
    "longer": lambda path: os.truncate(path, path.stat().st_size + 1),
    "a terabyte": lambda path: os.truncate(path, 2**40),
    "nonsense": lambda path: path.write_bytes(b"nonsense" * 100),
    "a lying header": lambda path: path.write_bytes(b"\xff" * 8 + path.read_bytes()[8:]),
}


def changed(change: Callable[[Tensors], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        tensors = load_file(path)
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        change(tensors)
        save_file(tensors, path)

    return apply


DAMAGE = THINGS | {name: changed(change) for name, change in CHANGES.items()}


def rerecorded(cache: Path) -> None:
    """Let the manifest say of the file what is true of it, so that what it holds must be looked at."""
    manifest, path = read_manifest(cache), cache / FILE
    record = FileRecord(file=FILE, bytes=path.lstat().st_size, sha256="ab" * 32)
    files = tuple(record if each.file == FILE else each for each in manifest.files)
    write_manifest(cache, dataclasses.replace(manifest, files=files))


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_bad_file_is_refused_in_one_line(tmp_path, damage):
    cache = stored_cache(tmp_path / "cache", "nf4", "int8")
    identity = read_manifest(cache).identity
    DAMAGE[damage](cache / FILE)
    for look in (read_all, lambda path: read_statistics(path, identity)):
        message = assert_refuses(cache, look)
        assert FILE in message
        assert "damaged" in message
    assert [problem.file for problem in verify_cache(cache, fast=damage in THINGS).problems] == [FILE]
    if os.path.lexists(cache / FILE) and damage not in ("a terabyte",):
        rerecorded(cache)
        assert FILE in assert_refuses(cache)


@pytest.mark.parametrize("damage", [name for name in DAMAGE if name != "missing"])
def test_a_bad_file_of_an_incomplete_cache_is_refused_and_can_be_removed(tmp_path, damage):
    writing = Stored("nf4", "int8")
    writer = writing.open(tmp_path / "cache")
    writer.statistics(lambda: writing.statistics)
    path = tmp_path / "cache" / FILE
    DAMAGE[damage](path)
    with pytest.raises(CacheError, match=r"statistics\.safetensors is damaged .* remove it") as caught:
        writing.open(tmp_path / "cache").statistics(lambda: writing.statistics)
    assert len(str(caught.value).splitlines()) == 1
    path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    assert_same(writing.open(tmp_path / "cache").statistics(lambda: writing.statistics), writing.statistics)


def test_a_flipped_bit_is_found_by_its_hash(tmp_path):
    cache = stored_cache(tmp_path / "cache", "nf4", "int8")
    data = bytearray((cache / FILE).read_bytes())
    data[-1] ^= 1
    (cache / FILE).write_bytes(data)
    (problem,) = verify_cache(cache).problems
    assert (problem.file, problem.reason) == (FILE, "its hash differs")


@pytest.mark.parametrize("codec", ["nf4", "fp8"])
def test_a_manifest_that_is_wrong_about_the_file_is_refused(tmp_path, codec):
    """Not listed though a codec needs it; listed though none does."""
    cache = stored_cache(tmp_path / "cache", codec, "bf16")
    manifest = read_manifest(cache)
    if codec == "nf4":
        files = tuple(record for record in manifest.files if record.file != FILE)
    else:
        (cache / FILE).write_bytes(b"x")
        files = (*manifest.files, FileRecord(file=FILE, bytes=1, sha256="ab" * 32))
    write_manifest(cache, dataclasses.replace(manifest, files=files))
    for look in (CacheReader, verify_cache):
        assert f"its file table is wrong about {FILE}" in assert_refuses(cache, look)


# A cache that lost files


def test_a_shard_whose_record_names_no_statistics_or_nonsense_is_written_again(tmp_path):
    writing = Stored("nf4", "int8")
    cache = tmp_path / "cache"
    writer = writing.open(cache)
    writer.statistics(lambda: writing.statistics)
    writing.write_shard(writer, 0)
    path = cache / "progress/00000.json"
    for value in ("", "zzz"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"statistics": value}))
        assert 0 in writing.open(cache).pending()
    writing.write(cache)
    assert verify_cache(cache).problems == []


def test_a_file_lost_at_the_end_is_one_error_and_comes_back(tmp_path):
    writing = Stored("nf4", "int8")
    cache = tmp_path / "cache"
    writer = writing.open(cache)
    writer.statistics(lambda: writing.statistics)
    (cache / FILE).unlink()
    with pytest.raises(CacheError, match=r"statistics\.safetensors is lost: run the same command again"):
        writing.finish(writer)
    writing.write(cache)
    assert verify_cache(cache).problems == []


def test_statistics_changed_between_two_shards_are_refused_by_the_next_process_and_at_the_end(tmp_path):
    writing = Stored("nf4", "int8")
    cache = tmp_path / "cache"
    writer = writing.open(cache)
    writer.statistics(lambda: writing.statistics)
    assert len(writer.manifest.plan) > 1
    writing.write_shard(writer, 0)
    whole = (cache / FILE).read_bytes()
    changed(lambda tensors: tensors["context.0.mean"].add_(1))(cache / FILE)
    with pytest.raises(CacheError, match="its hash is not the one that shards were written with"):
        writing.open(cache).statistics(lambda: writing.statistics)
    with pytest.raises(CacheError, match="its hash is not the one that shards were written with"):
        writing.finish(writer)
    (cache / FILE).write_bytes(whole)
    assert writer.finalise().status == "complete"
    assert verify_cache(cache).problems == []


def test_a_lost_file_is_measured_again_to_the_same_bytes(tmp_path):
    cache = stored_cache(tmp_path / "cache", "nf4", "int8")
    before = every_byte(cache)
    (cache / FILE).unlink()
    writing = Stored("nf4", "int8")
    writer = writing.open(cache)
    assert not writer.complete
    assert writer.pending() == []
    assert not writer.statistics_written()
    manifest = read_manifest(cache)
    assert len(finished_files(cache, manifest).shards) == len(manifest.plan), "its shards are kept"
    writing.write(cache)
    assert every_byte(cache) == before


def test_other_figures_than_the_lost_ones_are_refused_and_not_written(tmp_path):
    cache = stored_cache(tmp_path / "cache", "nf4", "int8")
    data = (cache / FILE).read_bytes()
    (cache / FILE).unlink()
    writing = Stored("nf4", "int8")
    others = some_statistics(writing.identity, 1e-6)
    for _ in range(2):
        with pytest.raises(
            CacheError, match=r"statistics\.safetensors is lost .* run the same command again"
        ) as caught:
            writing.open(cache).statistics(lambda: others)
        assert len(str(caught.value).splitlines()) == 1
        assert not (cache / FILE).exists()
    (cache / FILE).write_bytes(data)  # found again
    assert_same(writing.open(cache).statistics(lambda: others), writing.statistics)


def test_a_changed_file_is_not_used_with_the_shards_of_another(tmp_path):
    """A shard is lost too, so that the cache is opened for writing."""
    cache = stored_cache(tmp_path / "cache", "nf4", "int8")
    changed(lambda tensors: tensors["context.0.mean"].add_(1))(cache / FILE)
    (cache / "shards/00001.safetensors").unlink()
    writing = Stored("nf4", "int8")
    with pytest.raises(CacheError, match="its hash is not the one that shards were written with"):
        writing.open(cache).statistics(lambda: writing.statistics)
    (cache / FILE).unlink()
    writing.write(cache)
    assert verify_cache(cache).problems == []


def test_what_a_reopened_cache_remembers(tmp_path):
    cache = stored_cache(tmp_path / "cache", "int8", "bf16")
    (digest,) = [record.sha256 for record in read_manifest(cache).files if record.file == FILE]
    (cache / FILE).unlink()
    Stored("int8", "bf16").open(cache)
    kept = json.loads((cache / "progress/kept.json").read_text())
    assert kept["statistics"] == digest
    assert all(kept["bytes"])
