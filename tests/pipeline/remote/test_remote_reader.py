"""A cache in an object store is read like the directory it was copied from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.cache import CacheReader
from pipeline.cache.remote.local import LocalStore
from pipeline.remote.address import Address


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
