"""`dspark convert` and `dspark sync --layers` from object stores and to them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from pipeline.cache import CacheReader, read_manifest
from pipeline.cache.manifest import shard_file
from pipeline.cache.remote.local import VARIABLE
from pipeline.cache.remote.sync import sync
from pipeline.remote.address import Address
from pipeline.remote.objects import Objects
from tests.conftest import assert_refused, run_cli, run_ok
from tests.pipeline.written import every_byte
from tests.s3 import Faulty

INT8 = ("--context-codec", "int8", "--layers", "0,4")


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "store"))
    return tmp_path / "store"


@pytest.fixture
def remote_cache(s3: Address, cache_dir: Path) -> Address:
    sync(cache_dir, s3)
    return s3


@pytest.fixture
def converted(tmp_path: Path, cache_dir: Path) -> Path:
    run_ok("convert", cache_dir, tmp_path / "converted", *INT8)
    return tmp_path / "converted"


def without_history(cache: Path) -> dict:
    """A manifest but for what its source's manifest decides: a copy far away has hashes of tensors."""
    values = dataclasses.asdict(read_manifest(cache))
    for name in ("history", "checksum", "tensors"):
        del values[name]
    return values


def test_from_an_object_store_to_a_directory(tmp_path, remote_cache: Address, converted: Path) -> None:
    run_ok("convert", remote_cache, tmp_path / "back", *INT8)
    got, want = every_byte(tmp_path / "back"), every_byte(converted)
    assert got.pop("manifest.json") != want.pop("manifest.json")
    assert got == want
    assert without_history(tmp_path / "back") == without_history(converted)
    run_ok("verify", tmp_path / "back")


def test_from_a_directory_to_an_object_store(tmp_path, s3: Address, cache_dir, converted: Path) -> None:
    run_ok("convert", cache_dir, s3, *INT8)
    run_ok("verify", s3)
    for name, data in every_byte(converted).items():
        if name != "manifest.json":
            assert Objects(s3).read(name) == data, name
    assert CacheReader(s3).manifest.history == read_manifest(converted).history
    assert "already complete" in run_ok("convert", cache_dir, s3, *INT8)
    other = run_cli("convert", cache_dir, s3, "--layers", "0")
    assert_refused(other, 1, f"{s3} holds another capture", "features.layer_ids")


def test_layers_are_synced_from_one_to_the_other_as_they_are(
    tmp_path, remote_cache: Address, cache_dir
) -> None:
    said = run_ok("sync", remote_cache, tmp_path / "few", "--layers", "2")
    assert "converted from" in said
    near, few = CacheReader(cache_dir), CacheReader(tmp_path / "few")
    assert few.layer_ids == (2,)
    for i in range(len(near)):
        assert near.layer_view(i, 2).tolist() == few.layer_view(i, 2).tolist()
    there = Address(f"{remote_cache}-few")
    run_ok("sync", remote_cache, there, "--layers", "2")
    far = CacheReader(there)
    assert [far.layer_view(i, 2).tolist() for i in range(len(far))] == [
        few.layer_view(i, 2).tolist() for i in range(len(few))
    ]


def test_only_what_is_kept_is_fetched(tmp_path, remote_cache: Address, store: Path) -> None:
    run_ok("sync", remote_cache, tmp_path / "few", "--layers", "2")
    fetched = sum(path.stat().st_size for path in store.glob("*/fetched/*/*"))
    far = CacheReader(remote_cache)
    far.only([2])
    kept = sum(map(far.files.size, range(len(far.manifest.plan))))
    assert fetched == kept < 0.8 * sum(far.manifest.shards.bytes)


def test_a_damaged_object_is_refused_by_its_url_and_what_was_done_is_kept(
    tmp_path, remote_cache: Address
) -> None:
    objects, name = Objects(remote_cache), shard_file(2)
    data = bytearray(objects.read(name))
    data[-1] ^= 1
    objects.write(name, bytes(data))
    few = ("--layers", "0,4")
    result = run_cli("convert", remote_cache, tmp_path / "back", *few)
    assert_refused(result, 1, f"{remote_cache}/{name} is damaged")
    assert (tmp_path / "back" / shard_file(1)).exists()
    data[-1] ^= 1
    objects.write(name, bytes(data))
    run_ok("convert", remote_cache, tmp_path / "back", *few)


def test_one_place_for_both_is_refused(remote_cache: Address) -> None:
    assert_refused(run_cli("convert", remote_cache, remote_cache, "--layers", "0"), 2, "is the cache to read")
    inside = f"{remote_cache}/inside"
    assert_refused(run_cli("sync", remote_cache, inside, "--layers", "0"), 2, "inside of it")


def test_a_store_that_fails_now_and_then_changes_nothing(faulty: Faulty, s3: Address, cache_dir) -> None:
    faulty.faults += [lambda _status, _body: (503, b"")] * 2
    run_ok("convert", cache_dir, s3, *INT8)
    assert not faulty.faults
    run_ok("verify", s3)
