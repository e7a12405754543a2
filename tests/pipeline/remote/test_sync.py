"""A copy of a cache holds the same bytes, continues where it was stopped, and replaces no other cache."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from pathlib import Path

import pytest

from pipeline.cache import CacheReader, read_manifest
from pipeline.cache.manifest import ShardFiles, shard_file
from pipeline.cache.progress.claims import own_state
from pipeline.cache.remote.sync import sync
from pipeline.errors import CacheError
from pipeline.remote.address import Address
from pipeline.remote.objects import Objects
from tests.conftest import assert_refused, run_cli, run_ok
from tests.pipeline.written import every_byte, small_cache


class StopHereError(Exception):
    pass


def stop_after(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Let a copy end without warning after so many writes to an object store."""
    written: list[str] = []
    write = Objects.write

    def counted(self: Objects, name: str, data: bytes | Path) -> None:
        if len(written) == count:
            raise StopHereError
        written.append(name)
        write(self, name, data)

    monkeypatch.setattr(Objects, "write", counted)


def without_hashes(cache: Path) -> dict[str, bytes]:
    return {name: data for name, data in every_byte(cache).items() if name != "manifest.json"}


def test_there_and_back(s3: Address, local_cache: Path, scratch) -> None:
    back = scratch()
    out = run_ok("sync", local_cache, str(s3))
    assert f"cache {s3}: complete, " in out
    assert "already complete" in run_ok("sync", local_cache, str(s3))
    run_ok("sync", str(s3), back)
    assert without_hashes(back) == without_hashes(local_cache)
    assert CacheReader(back).verify() == []
    assert "already complete" in run_ok("sync", str(s3), back)
    manifest, whole = read_manifest(back), read_manifest(local_cache)
    assert manifest.shards == whole.shards
    # The hashes of tensors are those of the bytes, found here by the offsets in the files' own headers.
    for shard in range(len(whole.plan)):
        data = (back / shard_file(shard)).read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        assert header.keys() == manifest.tensors.keys()
        for name, entry in header.items():
            first, last = entry["data_offsets"]
            digest = hashlib.sha256(data[start + first : start + last]).hexdigest()
            assert digest == manifest.tensors[name][shard]


def test_from_one_address_to_another(s3: Address, remote_cache: Address, local_cache: Path, scratch) -> None:
    other = Address(f"{s3}-2")
    run_ok("sync", str(remote_cache), str(other))
    run_ok("sync", str(other), back := scratch())
    assert without_hashes(back) == without_hashes(local_cache)


@pytest.mark.parametrize("count", [0, 1, 2, 5, 12, 15])
def test_a_stopped_copy_continues(
    s3: Address, local_cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, count: int
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, count)
        with pytest.raises(StopHereError):
            sync(local_cache, s3)
    with pytest.raises(CacheError, match=r"no cache at|is incomplete"):
        CacheReader(s3)
    _, copied = sync(local_cache, s3)
    whole = read_manifest(local_cache)
    done = max(0, (count - 1) // 2)
    assert copied == whole.num_bytes - sum(whole.shards.bytes[:done])
    names = sorted(entry.name for entry in Objects(s3).list())
    assert names == sorted(name for name in every_byte(local_cache))


def test_a_shard_that_was_lost_or_has_a_strange_record_is_copied_again(
    s3: Address, local_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        stop_after(patch, 7)  # the manifest, and three shards with their records
        with pytest.raises(StopHereError):
            sync(local_cache, s3)
    objects, whole = Objects(s3), read_manifest(local_cache)
    objects.remove([shard_file(0)])
    record = json.loads(objects.read("progress/00001.json"))
    objects.write("progress/00001.json", json.dumps(record | {"tensors": {"x": "0"}}).encode())
    _, copied = sync(local_cache, s3)
    assert copied == whole.num_bytes - whole.shards.bytes[2]
    assert CacheReader(s3).manifest.tensors["input_ids"]


def test_a_stopped_download_continues(
    remote_cache: Address, local_cache: Path, scratch, monkeypatch: pytest.MonkeyPatch
) -> None:
    back, read = scratch(), Objects.read_ranges

    def stops(self: Objects, name: str, *arguments) -> None:
        if name == shard_file(3):
            raise StopHereError
        read(self, name, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Objects, "read_ranges", stops)
        with pytest.raises(StopHereError):
            sync(remote_cache, back)
    with pytest.raises(CacheError, match="no cache at"):
        CacheReader(back)
    _, copied = sync(remote_cache, back)
    assert copied < read_manifest(local_cache).num_bytes
    assert without_hashes(back) == without_hashes(local_cache)


def test_what_is_not_whole_is_not_copied(s3: Address, local_cache: Path) -> None:
    path = local_cache / shard_file(2)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert_refused(
        run_cli("sync", local_cache, str(s3)), 1, str(path), "is damaged", "dspark verify --repair"
    )
    assert_refused(run_cli("inspect", local_cache / "no"), 1, "no cache")


def test_nothing_else_is_replaced(s3: Address, remote_cache: Address, scratch) -> None:
    other = small_cache(scratch(), count=5, layers=(0, 2))
    assert_refused(run_cli("sync", other, str(s3)), 1, f"{s3} holds another capture")
    Objects(Address(f"{s3}-x")).write("notes.txt", b"mine")
    assert_refused(run_cli("sync", other, f"{s3}-x"), 1, "is not empty and holds no manifest.json")
    mine = scratch()
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    assert_refused(run_cli("sync", str(s3), mine), 2, "is not empty")
    assert_refused(run_cli("sync", str(s3), other), 1, f"{other} holds another capture")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("ftp://host/x", "expected a path, file://, s3://, gs://, az://"),
        ("s3://", "is no place for a cache"),
        ("s3://key:secret@bucket/x", "no credentials and no parameters"),
        ("s3://key:a/secret@bucket/x", "no credentials and no parameters"),
        ("s3://bucket/x?X-Amz-Signature=secret", "no credentials and no parameters"),
        ("s3://bucket/../x", "is no place for a cache"),
        ("file://host/x", "names another host"),
    ],
)
def test_addresses_that_are_none(tmp_path: Path, url: str, words: str) -> None:
    assert_refused(run_cli("sync", url, tmp_path / "c"), 2, words)
    assert "secret" not in run_cli("sync", url, tmp_path / "c").output


def test_a_file_url_is_a_path(local_cache: Path, scratch) -> None:
    run_ok("sync", f"file://{local_cache}", back := scratch())
    assert without_hashes(back) == without_hashes(local_cache)


def test_verify_and_inspect_read_there(s3: Address, cache_dir: Path, tmp_path: Path) -> None:
    run_ok("sync", cache_dir, str(s3))
    good = run_ok("verify", str(s3))
    assert good.replace(str(s3), str(cache_dir)) == run_ok("verify", cache_dir)
    ours, theirs = (json.loads(run_ok("inspect", place, "--json")) for place in (str(s3), cache_dir))
    differing = {name for name in ours if ours[name] != theirs[name]}
    assert differing == {"cache", "bytes"}  # the manifest is longer
    sample = [run_ok("inspect", place, "--sample", "#3") for place in (str(s3), cache_dir)]
    assert sample[0] == sample[1]
    data = bytearray(Objects(s3).read(shard_file(1)))
    data[-3] ^= 1
    Objects(s3).write(shard_file(1), bytes(data))
    Objects(s3).remove([shard_file(2)])
    bad = run_cli("verify", str(s3))
    assert_refused(bad, 1, "2 of", "are damaged or missing", "dspark sync")
    assert f"damaged: {s3}/{shard_file(1)}: its hash differs" in bad.stdout
    assert f"damaged: {s3}/{shard_file(2)}: expected" in bad.stdout
    assert f"damaged: {s3}/{shard_file(1)}" not in run_cli("verify", str(s3), "--fast").stdout


def test_commands_that_write_take_directories(s3: Address, local_cache: Path) -> None:
    assert_refused(run_cli("verify", str(s3), "--repair"), 2, "--repair")


def test_inspect_shows_how_far_a_capture_to_an_object_store_is(s3: Address, cache_dir: Path) -> None:
    """Two shards of one that was killed once: a worker lives, another's process is gone."""
    complete = read_manifest(cache_dir)
    unfinished = dataclasses.replace(
        complete, status="incomplete", shards=ShardFiles(), files=(), fidelity={}, tensors={}
    )
    objects = Objects(s3)
    objects.write("manifest.json", unfinished.to_json())
    for shard in (0, 3):
        objects.write(shard_file(shard), (cache_dir / shard_file(shard)).read_bytes())
        objects.write(f"progress/{shard:05d}.json", b"{}")
    objects.write(shard_file(5), b"of a shard without a record")
    state = own_state("rank 1", time.monotonic() - 10, 4000)
    objects.write("progress/worker-here.json", json.dumps(dataclasses.asdict(state)).encode())
    gone = dataclasses.replace(state, pid=2**22 - 1)
    objects.write("progress/worker-gone.json", json.dumps(dataclasses.asdict(gone)).encode())
    facts = json.loads(run_ok("inspect", str(s3), "--json"))
    assert facts["status"] == "incomplete"
    progress = facts["progress"]
    assert progress["shards_done"] == 2
    assert progress["tokens_done"] == complete.plan.tokens[0] + complete.plan.tokens[3]
    assert progress["bytes_done"] == complete.shards.bytes[0] + complete.shards.bytes[3]
    assert not progress["target_written"]
    assert [worker["label"] for worker in progress["workers"]] == ["rank 1"]
    assert f"2 of {len(complete.plan)} shards" in run_ok("inspect", str(s3))
