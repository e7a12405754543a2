"""An object store that fails: a read is tried again, then refused with its URL. No wrong byte is read."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from pipeline.cache import CacheReader
from pipeline.cache.manifest import shard_file
from pipeline.cache.remote.local import LocalStore
from pipeline.errors import CacheError
from pipeline.remote import objects
from pipeline.remote.address import Address
from pipeline.remote.objects import StoreError
from tests.conftest import assert_refused, run_cli
from tests.pipeline.remote.test_remote_reader import equal, stored
from tests.s3 import Faulty


def unavailable(_status: int, _body: bytes) -> tuple[int, bytes]:
    return 503, b""


def half(status: int, body: bytes) -> tuple[int, bytes]:
    return status, body[: len(body) // 2]


def slow(status: int, body: bytes) -> tuple[int, bytes]:
    time.sleep(0.3)
    return status, body


def flipped(status: int, body: bytes) -> tuple[int, bytes]:
    """Another object's bytes, of the same size."""
    return status, bytes(byte ^ 1 for byte in body)


def fine(status: int, body: bytes) -> tuple[int, bytes]:
    return status, body


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objects, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(objects, "RETRY_SECONDS", 0.5)


@pytest.mark.parametrize("fault", [unavailable, half, slow, flipped])
def test_what_fails_for_a_while_is_read_in_the_end(
    tmp_path: Path, local_cache: Path, remote_cache: Address, faulty: Faulty, fault
) -> None:
    near = CacheReader(local_cache)
    far = CacheReader(remote_cache, store=LocalStore(tmp_path, 10**9))
    faulty.faults = [fine, fault, fault, fine, fault]  # the first request is of the header
    assert all(equal(near.read(i), far.read(i)) for i in range(len(near)))
    assert not faulty.faults


def test_a_cache_without_hashes_of_tensors_is_fetched_whole(
    tmp_path: Path, local_cache: Path, unhashed_cache: Address, faulty: Faulty
) -> None:
    near, far = CacheReader(local_cache), CacheReader(unhashed_cache, store=LocalStore(tmp_path, 10**9))
    far.only([2])
    faulty.faults = [flipped]
    assert equal(near.read(0, [2]), far.read(0, [2]))
    (path,) = stored(tmp_path)
    assert path.read_bytes() == (local_cache / shard_file(0)).read_bytes()
    faulty.faults = [flipped] * 2
    with pytest.raises(CacheError, match=r"00005\.safetensors is damaged .it has another hash, twice"):
        far.read(11, [2])


def test_a_sample_alone_of_other_tokens_is_refused(
    tmp_path: Path, local_cache: Path, remote_cache: Address, faulty: Faulty
) -> None:
    far = CacheReader(remote_cache, store=LocalStore(tmp_path, 10**9))
    far.alone([4])
    faulty.faults = [fine, *[flipped] * 100]  # the first request is of the header
    with pytest.raises(CacheError, match="sample 4 has other tokens than its id says, twice"):
        far.read(4)


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        (unavailable, StoreError, "can't be read"),
        (half, StoreError, "can't be read"),
        (flipped, CacheError, r"is damaged \(tensor .* has another hash, twice\)"),
    ],
)
def test_what_fails_for_good_is_named(
    tmp_path: Path, local_cache: Path, remote_cache: Address, faulty: Faulty, fault, kind, words: str
) -> None:
    near = CacheReader(local_cache)
    far = CacheReader(remote_cache, store=LocalStore(tmp_path, 10**9))
    faulty.faults = [fine, *[fault] * 10_000]
    with pytest.raises(kind, match=f"{remote_cache}/shards/00000.safetensors {words}"):
        far.read(0)
    assert not stored(tmp_path)  # and nothing half fetched is left
    faulty.faults = []
    assert equal(near.read(0), far.read(0))


def test_a_bucket_that_does_not_exist_is_named(s3: Address, cache_dir: Path) -> None:
    for command in (("inspect", "s3://nowhere/x"), ("sync", cache_dir, "s3://nowhere/x")):
        assert_refused(run_cli(*command), 1, "s3://nowhere/x is in a bucket that does not exist: create it")
