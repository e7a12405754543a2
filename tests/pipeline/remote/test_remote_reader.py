"""A cache in an object store is read like the directory it was copied from."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest
import torch

from pipeline.cache import CacheReader
from pipeline.cache.remote.local import LocalStore
from pipeline.cache.remote.sync import sync
from pipeline.errors import ConfigError
from pipeline.remote.address import Address
from tests.pipeline.written import sharing_cache
from train.data.ahead import fetched_ahead


def stored(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/fetched/*/*"))


def equal(a, b) -> bool:
    return all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y
        for x, y in zip(vars(a).values(), vars(b).values(), strict=True)
    )


def test_samples_are_those_of_the_directory(tmp_path: Path, local_cache: Path, remote_cache: Address) -> None:
    store = LocalStore(tmp_path / "store", 10**9)
    near, far = CacheReader(local_cache), CacheReader(remote_cache, store=store)
    assert len(near) == len(far) == 12
    assert not stored(store.folder)  # opening reads no shard
    far.check_shards()
    for i in range(len(near)):
        assert equal(near.read(i), far.read(i))
    assert torch.equal(near.frozen()["embed_tokens.weight"], far.frozen()["embed_tokens.weight"])
    shards = len(near.manifest.plan)
    assert shards > 3
    assert len(stored(store.folder)) == shards


@pytest.mark.parametrize("alone", [False, True])
def test_rows_that_samples_share_are_those_of_the_directory(tmp_path: Path, s3: Address, alone: bool) -> None:
    sharing = sharing_cache(tmp_path / "sharing")
    sync(sharing, s3)
    near, far = CacheReader(sharing), CacheReader(s3, store=LocalStore(tmp_path / "store", 10**9))
    if alone:
        far.alone(range(6))
    for i in range(6):
        assert equal(near.read(i), far.read(i))
        assert torch.equal(near.layer_view(i, 2), far.layer_view(i, 2))
    assert near.read(2).context[:2].tolist() == near.read(0).context[:2].tolist()


@pytest.mark.parametrize("layers", [(0,), (0, 5), (2, 5)])
def test_only_the_layers_asked_for_are_fetched(
    tmp_path: Path, local_cache: Path, remote_cache: Address, layers: tuple[int, ...]
) -> None:
    store = LocalStore(tmp_path / "store", 10**9)
    near, far = CacheReader(local_cache), CacheReader(remote_cache, store=store)
    far.only(layers)
    for i in range(len(near)):
        assert equal(near.read(i, layers), far.read(i, layers))
    fetched = sum(path.stat().st_size for path in stored(store.folder))
    assert fetched < sum(near.manifest.shards.bytes)
    with pytest.raises(KeyError):  # never zeros in place of what was not fetched
        far.layer_view(0, ({0, 2, 5} - {*layers}).pop())


def test_the_store_keeps_its_limit(tmp_path: Path, local_cache: Path, remote_cache: Address) -> None:
    near = CacheReader(local_cache)
    limit = sum(near.manifest.shards.bytes) // 3
    store = LocalStore(tmp_path / "store", limit)
    far = CacheReader(remote_cache, store=store)
    for i in [*range(len(near)), *reversed(range(len(near)))]:
        assert equal(near.read(i), far.read(i))
        assert sum(path.stat().st_size for path in stored(store.folder)) <= limit
    assert len(stored(store.folder)) > 1


def test_a_sample_alone_is_fetched_without_its_shard(
    tmp_path: Path, local_cache: Path, remote_cache: Address
) -> None:
    store = LocalStore(tmp_path / "store", 10**9)
    near, far = CacheReader(local_cache), CacheReader(remote_cache, store=store)
    far.only([2])
    far.alone([1, 7, 11])
    for i in (11, 1, 7, 1):
        assert equal(near.read(i, [2]), far.read(i, [2]))
        assert torch.equal(near.tokens(i)[0], far.tokens(i)[0])
        assert torch.equal(near.layer_view(i, 2), far.layer_view(i, 2))
    assert [path.name.partition("-")[0] for path in stored(store.folder)] == ["sample"] * 3
    assert equal(near.read(2, [2]), far.read(2, [2]))


def test_a_file_damaged_in_the_store_is_fetched_again(
    tmp_path: Path, local_cache: Path, remote_cache: Address
) -> None:
    store = LocalStore(tmp_path / "store", 10**9)
    near = CacheReader(local_cache)
    CacheReader(remote_cache, store=store).read(0)
    (path,) = stored(store.folder)
    path.write_bytes(path.read_bytes()[:-1])
    (config,) = store.folder.glob("*/target/config.json")
    config.write_bytes(b"")
    assert equal(near.read(0), CacheReader(remote_cache, store=store).read(0))


def test_packs_without_end_are_not_all_taken_before_the_first(tmp_path: Path, remote_cache: Address) -> None:
    reader = CacheReader(remote_cache, store=LocalStore(tmp_path / "store", 10**9))
    packs = fetched_ahead(reader, (([i % 12], i) for i in itertools.count()))
    assert [number for _, number in itertools.islice(packs, 600)] == list(range(600))
    packs.close()


def test_later_packs_are_fetched_meanwhile(tmp_path: Path, remote_cache: Address) -> None:
    store = LocalStore(tmp_path / "store", 10**9)
    reader = CacheReader(remote_cache, store=store)
    packs = fetched_ahead(reader, (([i], None) for i in range(12)))
    next(packs)
    until = time.monotonic() + 10
    while len(stored(store.folder)) < len(reader.manifest.plan) and time.monotonic() < until:
        time.sleep(0.01)
    assert len(stored(store.folder)) == len(reader.manifest.plan)
    packs.close()


def test_a_tiny_store_is_refused_in_one_line(tmp_path: Path, remote_cache: Address) -> None:
    reader = CacheReader(remote_cache, store=LocalStore(tmp_path / "store", 1))
    with pytest.raises(ConfigError, match="does not fit the local store of 1 B"):
        next(fetched_ahead(reader, [([0], None)]))


def test_what_was_evicted_is_unmapped_when_another_is_mapped(tmp_path: Path, remote_cache: Address) -> None:
    reader = CacheReader(remote_cache, store=LocalStore(tmp_path / "store", 10**9))
    reader.read(0)
    (path,) = stored(tmp_path / "store")
    held = reader.files.mapped(0)
    path.unlink()
    reader.read(0)  # what is mapped is still right
    assert reader.files.mapped(0) is held
    reader.read(11)
    assert reader.files.mapped(0) is None
