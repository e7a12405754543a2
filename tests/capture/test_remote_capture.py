"""A capture to an object store gives the bytes of one to a directory, by any workers, killed or not."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.cache.progress import claims
from pipeline.cache.remote.claims import RemoteWorker
from pipeline.cache.remote.writer import RemoteWriter
from pipeline.remote.address import Address
from pipeline.remote.objects import Objects, StoreError
from tests.conftest import assert_refused, capture_arguments, run_cli, run_ok
from tests.pipeline.written import every_byte
from tests.processes import Dspark
from tests.s3 import s3, s3_server

__all__ = ["s3", "s3_server"]


@pytest.fixture(autouse=True)
def staging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of this test's local store and staging directory."""
    monkeypatch.setenv("DSPARK_LOCAL_CACHE", str(tmp_path / "local"))
    return tmp_path / "local" / "staging"


def assert_same_cache(place: Address, cache: Path, tmp_path: Path) -> None:
    """The copy of a cache in an object store has the bytes of one in a directory, its manifest apart."""
    back = tmp_path / "back"
    run_ok("sync", str(place), back)
    ours, theirs = every_byte(back), every_byte(cache)
    manifests = [json.loads(each.pop("manifest.json")) for each in (ours, theirs)]
    assert ours == theirs
    for manifest in manifests:
        manifest.pop("checksum")
        manifest["identity"]["data"].pop("sources")
    assert manifests[0].pop("tensors").keys() == {
        "input_ids",
        "loss_mask",
        "context.0",
        "context.2",
        "context.4",
        "last_hidden",
    }
    assert manifests[0] == manifests[1]
    assert {entry.name for entry in Objects(place).list()} == set(every_byte(cache))


def test_the_bytes_are_those_of_a_directory(
    s3: Address, target_dir: Path, data_file: Path, cache_dir: Path, tmp_path: Path, staging: Path
) -> None:
    arguments = capture_arguments(target_dir, data_file, str(s3))
    out = run_ok(*arguments)
    assert f"written to {s3}, shard by shard" in out
    assert f"cache {s3}: complete" in out
    assert_same_cache(s3, cache_dir, tmp_path)
    assert not list(staging.glob("*"))
    assert "already complete, reused" in run_ok(*arguments)
    assert "already complete, reused" in run_ok("capture", "--cache", str(s3))
    run_ok("verify", str(s3))


def test_what_is_there_is_not_replaced(s3: Address, target_dir: Path, data_file: Path) -> None:
    Objects(s3).write("notes.txt", b"mine")
    assert_refused(run_cli(*capture_arguments(target_dir, data_file, str(s3))), 1, "is not empty")
    Objects(s3).remove(["notes.txt"])
    run_ok(*capture_arguments(target_dir, data_file, str(s3)))
    other = [*capture_arguments(target_dir, data_file, str(s3)), "--num-samples", "20"]
    assert_refused(run_cli(*other), 1, f"{s3} holds another capture", "data.sha256")


def test_a_copy_back_is_repaired_by_its_capture(
    s3: Address, target_dir: Path, data_file: Path, cache_dir: Path, tmp_path: Path
) -> None:
    back = tmp_path / "back"
    run_ok("sync", cache_dir, str(s3))
    run_ok("sync", str(s3), back)
    (back / "shards" / "00001.safetensors").unlink()
    run_ok(*capture_arguments(target_dir, data_file, back))
    run_ok("verify", back)


def test_what_was_not_uploaded_is_not_captured_again(
    s3: Address,
    target_dir: Path,
    data_file: Path,
    cache_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write, real, written = Objects.write, RemoteWriter.write_shard, []

    def dies(self: Objects, name: str, *data: Any) -> str:
        if name == "shards/00001.safetensors":
            raise StoreError("the line is cut")
        return write(self, name, *data)

    def write_shard(writer: RemoteWriter, shard: int, *rest: Any, **more: Any) -> None:
        written.append(shard)
        real(writer, shard, *rest, **more)

    arguments = capture_arguments(target_dir, data_file, str(s3))
    with monkeypatch.context() as patch:
        patch.setattr(Objects, "write", dies)
        assert_refused(run_cli(*arguments), 1, "the line is cut")
    monkeypatch.setattr(RemoteWriter, "write_shard", write_shard)
    run_ok(*arguments)
    assert written
    assert 1 not in written
    assert_same_cache(s3, cache_dir, tmp_path)


STRAY = {
    "progress/99999.json": b"{}",
    "progress/target.json": b"{dam",
    "progress/00001.json": json.dumps(
        {"file": "shards/00001.safetensors", "bytes": 1, "sha256": "0" * 64, "measured": {}, "tensors": {}}
    ).encode(),
}


@pytest.mark.parametrize("name", [*STRAY, "tensors"])
def test_records_that_no_capture_writes(
    s3: Address, target_dir: Path, data_file: Path, cache_dir: Path, tmp_path: Path, name: str
) -> None:
    write = Objects.write

    def dies(self: Objects, name: str, *data: Any) -> str:
        if name == "shards/00002.safetensors":
            raise StoreError("the line is cut")
        return write(self, name, *data)

    arguments = capture_arguments(target_dir, data_file, str(s3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Objects, "write", dies)
        assert_refused(run_cli(*arguments), 1, "the line is cut")
    if name == "tensors":
        name = "progress/00001.json"
        record = json.loads(Objects(s3).read(name))
        del record["tensors"]["context.0"]
        data = json.dumps(record).encode()
    else:
        data = STRAY[name]
    Objects(s3).write(name, data)
    shutil.rmtree(tmp_path / "local")  # as from another machine
    run_ok(*arguments)
    assert_same_cache(s3, cache_dir, tmp_path)


@pytest.mark.parametrize("what", ["shard", "record"])
def test_a_shard_lost_after_its_record_is_captured_again(
    s3: Address, target_dir: Path, data_file: Path, cache_dir: Path, tmp_path: Path, what: str
) -> None:
    write, lost = Objects.write, []

    def loses(self: Objects, name: str, *data: Any) -> str:
        tag = write(self, name, *data)
        if name == "progress/00002.json" and not lost:
            lost.append(name)
            raise StoreError("the line is cut")
        return tag

    arguments = capture_arguments(target_dir, data_file, str(s3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Objects, "write", loses)
        assert_refused(run_cli(*arguments), 1, "the line is cut")
    Objects(s3).remove(["shards/00002.safetensors"])
    if what == "record":
        write(Objects(s3), "progress/00002.json", b'{"file": "shards/00002.safetensors", "bytes": 1}')
    run_ok(*arguments)
    assert_same_cache(s3, cache_dir, tmp_path)


def test_two_workers_killed_at_any_moment(
    s3: Address, target_dir: Path, data_file: Path, cache_dir: Path, tmp_path: Path
) -> None:
    draw = random.Random(1)
    arguments = capture_arguments(target_dir, data_file, str(s3))

    def started(kill: int) -> list[Dspark]:
        """Two workers as if each was on a machine of its own: with its own staging directory."""
        each = [(i, {"DSPARK_LOCAL_CACHE": str(tmp_path / f"machine-{i}")}) for i in range(2)]
        return [Dspark(tmp_path / f"{kill}-{i}", *arguments, "--worker", f"{i}/2", **own) for i, own in each]

    ends: list[int] = []
    for kill in range(3):
        workers = started(kill)
        objects = Objects(s3)
        wanted = 1 + 4 * kill  # shards there when both are killed
        until = time.monotonic() + 60
        while time.monotonic() < until and any(worker.process.is_alive() for worker in workers):
            if sum(entry.name.startswith("shards/") for entry in objects.list()) >= wanted:
                break
            time.sleep(0.02)
        time.sleep(draw.random() / 20)
        for worker in workers:
            with contextlib.suppress(ProcessLookupError):  # one was fast
                worker.send(signal.SIGKILL)
        ends += [worker.wait() for worker in workers]
    assert ends.count(-signal.SIGKILL) >= 3, ends
    workers = started(3)
    assert [worker.wait() for worker in workers] == [0, 0], [worker.err for worker in workers]
    assert_same_cache(s3, cache_dir, tmp_path)


@pytest.mark.parametrize("how", ["refused", "ignored"])
def test_a_store_without_conditional_writes_is_refused(
    s3: Address, target_dir: Path, data_file: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    if how == "refused":
        monkeypatch.setenv("AWS_CONDITIONAL_PUT", "disabled")
    else:
        monkeypatch.setattr(Objects, "create", lambda self, name, data: bool(self.write(name, data)))
    result = run_cli(*capture_arguments(target_dir, data_file, str(s3)))
    assert_refused(result, 1, f"{s3} has no conditional writes", "dspark sync")


def test_the_staging_directory_keeps_its_limit(
    s3: Address, target_dir: Path, data_file: Path, staging: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, most = Objects.write, []

    def slowly(self: Objects, name: str, *data: Any) -> str:
        if name.startswith("shards/"):
            time.sleep(0.05)
            most.append(sum(path.stat().st_size for path in staging.glob("*/shards/[0-9]*")))
        return write(self, name, *data)

    monkeypatch.setattr(Objects, "write", slowly)
    near = [*capture_arguments(target_dir, data_file, staging / "cache"), "--staging-bytes", "1"]
    assert_refused(run_cli(*near), 2, "--staging-bytes is of captures to a URL")
    run_ok(*capture_arguments(target_dir, data_file, str(s3)), "--staging-bytes", "1")
    assert len(most) > 5
    sizes = [entry.bytes for entry in Objects(s3).list("shards")]
    assert max(most) <= max(sizes)  # one at a time


def test_who_was_inherited_from_can_own_again(s3: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker was silent, its heir took the shard and died, and the worker is back."""
    objects, lives = Objects(s3), RemoteWorker._lives
    monkeypatch.setattr(claims, "HEARTBEAT_SECONDS", 0.2)
    with RemoteWorker(objects) as silent, RemoteWorker(objects) as third:
        assert silent.claim("00001")
        heir = RemoteWorker(objects)
        with monkeypatch.context() as patch:
            patch.setattr(
                RemoteWorker, "_lives", lambda self, owner: owner != silent._id and lives(self, owner)
            )
            assert heir.claim("00001")
        heir._touch()
        assert heir.owns("00001")
        assert not silent.owns("00001")
        silent.release("00001")
        assert heir.owns("00001")
        assert not silent.claim("00001")
        assert not third.claim("00001")
        objects.remove([heir._name])  # it dies
        assert third.claim("00001")
        assert third.owns("00001")
        assert not heir.owns("00001")
        assert not silent.claim("00001")
        third.release("00001")
        assert silent.claim("00001")
        assert silent.owns("00001")


def test_a_claim_has_one_owner_and_an_heir(s3: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "HEARTBEAT_SECONDS", 0.2)
    objects = Objects(s3)
    with RemoteWorker(objects) as one, RemoteWorker(objects) as two:
        assert one.claim("00001")
        assert not two.claim("00001")
        one.release("00001")
        assert two.claim("00001")
        assert not two.others_died(lambda _number: None)
        objects.write("progress/00002.claim", b"abc-123-def")  # of a worker that is dead
        assert one.claim("00002")
        assert not two.claim("00002")
        objects.write("progress/00003.claim", b"../../elsewhere")
        assert two.claim("00003")
        # A worker of another machine lives as long as it writes its object.
        away = {"label": "", "host": "far", "place": "f" * 16, "pid": 1, "started": None}
        objects.write("progress/worker-fff-1-1.json", json.dumps(away).encode())
        objects.write("progress/00004.claim", b"fff-1-1")
        assert not one.claim("00004")
        monkeypatch.setattr(claims, "DEAD_AFTER_SECONDS", 1.5)
        assert one.others_died(lambda _number: None)
        assert one.claim("00004")
        objects.remove(["progress/worker-fff-1-1.json", "progress/00004.claim"])
    assert [e.name for e in objects.list()] == ["progress/00002.claim", "progress/00003.claim"]
