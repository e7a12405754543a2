"""Captures that answer their prompts into an object store: the bytes are those of a directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from capture import run
from capture.one_pass import two_steps
from capture.prepare import PreparedCapture
from pipeline.cache import CacheReader
from pipeline.cache.progress.claims import claim_name
from pipeline.cache.remote.claims import RemoteWorker
from pipeline.cache.remote.writer import RemoteWriter
from pipeline.remote.address import Address
from pipeline.remote.objects import Objects
from tests.capture.conftest import arguments
from tests.conftest import assert_refused, run_cli, run_ok
from tests.pipeline.written import every_byte
from tests.processes import Dspark
from tests.s3 import s3, s3_server
from tests.tiny import make_conversations

__all__ = ["s3", "s3_server"]  # fixtures


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of this machine's files."""
    monkeypatch.setenv("DSPARK_LOCAL_CACHE", str(tmp_path / "machine"))
    return tmp_path / "machine"


def copied(place: Address, folder: Path) -> Path:
    """A cache of the store in a directory. Its files are compared with their hashes on arrival."""
    run_ok("sync", str(place), folder)
    assert "all good" in run_ok("verify", folder)
    assert {entry.name for entry in Objects(place).list()} == set(every_byte(folder))
    return folder


def answers_of(cache: Path) -> list[list[int]]:
    reader = CacheReader(cache)
    return [reader.read(i).input_ids.tolist() for i in range(len(reader))]


def assert_same(cache: Path, calm: Path) -> None:
    """Two caches have the same bytes, but for the hashes of tensors in one manifest."""
    ours, theirs = every_byte(cache), every_byte(calm)
    manifests = [json.loads(each.pop("manifest.json")) for each in (ours, theirs)]
    assert ours == theirs
    assert manifests[0].pop("tensors").keys() >= {"input_ids", "context.0"}
    for manifest in manifests:
        manifest.pop("checksum")
    assert manifests[0] == manifests[1]


def test_the_bytes_are_those_of_a_directory(s3, words, calm, machine, tmp_path, monkeypatch):
    monkeypatch.setenv("COUNT", str(tmp_path / "starts"))
    assert "at most" in run_ok("plan", *words(s3)[1:])
    run_ok(*words(s3))
    assert_same(copied(s3, tmp_path / "back"), calm)
    assert not list((machine / "staging").glob("*"))
    starts = (tmp_path / "starts").read_text()
    for folder in ("machine", "another machine"):
        monkeypatch.setenv("DSPARK_LOCAL_CACHE", str(tmp_path / folder))
        assert "already complete, reused" in run_ok(*words(s3))
        assert not list((tmp_path / folder / "staging").glob("*"))
    assert (tmp_path / "starts").read_text() == starts
    assert_refused(run_cli(*words(s3, temperature=0)), 1, "data.settings.regenerate", "temperature=0.0")


class Killed(BaseException):
    """A kill at a moment that a test chooses."""


def run_until(name: str, words: list[str | Path]) -> None:
    """Run a capture that is killed before it writes an object of that name."""
    write = Objects.write

    def dies(self: Objects, each: str, *data: Any) -> str:
        if each == name:
            raise Killed
        return write(self, each, *data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Objects, "write", dies)
        with pytest.raises(Killed):
            run_cli(*words)


@pytest.mark.parametrize("moment", ["progress/00001.json", "shards/00002.safetensors", "manifest.json"])
def test_killed_it_goes_on_elsewhere(s3, words, calm, tmp_path, monkeypatch, moment):
    """On another machine, whose engine answers differently: what is finished is not answered again."""
    run_until(moment, words(s3))
    finished = sum(entry.name.endswith(".json") for entry in Objects(s3).list("progress"))
    assert "at most" in run_ok("inspect", str(s3))
    monkeypatch.setenv("DSPARK_LOCAL_CACHE", str(tmp_path / "another machine"))
    monkeypatch.setenv("SALT", "1")
    run_ok(*words(s3))
    found, first = answers_of(copied(s3, tmp_path / "back")), answers_of(calm)
    same = [ours == theirs for ours, theirs in zip(found, first, strict=True)]
    assert same[0]
    assert all(same) == (moment == "manifest.json"), finished


def test_killed_at_the_end_it_goes_on(s3, words, calm, tmp_path, monkeypatch):
    """On the same machine, whose staging directory has the index of the answers already."""
    with monkeypatch.context() as patch:
        patch.setattr(RemoteWriter, "_publish", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            run_cli(*words(s3))
    run_ok(*words(s3))
    assert_same(copied(s3, tmp_path / "back"), calm)


def test_killed_after_the_manifest_nothing_is_left(s3, words, tmp_path, monkeypatch):
    write = Objects.write

    def dies(self: Objects, name: str, *data: Any) -> str:
        write(self, name, *data)
        if name == "manifest.json":
            raise Killed
        return ""

    with monkeypatch.context() as patch:
        patch.setattr(Objects, "write", dies)
        with pytest.raises(Killed):
            run_cli(*words(s3))
    assert list(Objects(s3).list("progress"))
    assert "already complete" in run_ok(*words(s3))
    copied(s3, tmp_path / "back")


@pytest.mark.parametrize("machines", [1, 2])
def test_two_processes_share_one_pass(s3, words, calm, tmp_path, machines):
    both = []
    for i in range(2):
        local = str(tmp_path / f"machine {i % machines}")
        process = Dspark(tmp_path / str(i), *words(s3), "--worker", f"{i}/2", DSPARK_LOCAL_CACHE=local)
        both.append(process)
    assert [process.wait() for process in both] == [0, 0], [process.err[-3000:] for process in both]
    assert "already complete" in run_ok(*words(s3))
    assert_same(copied(s3, tmp_path / "back"), calm)


@pytest.mark.parametrize("overwritten", ["shards/00001.safetensors", "progress/answers-00001.jsonl"])
def test_a_shard_of_another_process_with_other_answers(s3, words, calm, tmp_path, monkeypatch, overwritten):
    """Two processes had owned a shard, and one wrote over what the other one had recorded."""
    other, real, found = Address(f"{s3}-other"), run.settle, []

    def keep(writer: RemoteWriter, prepared: Any) -> list[int]:
        found.append(Objects(other).read(overwritten))
        return real(writer, prepared)

    with monkeypatch.context() as patch:
        patch.setenv("SALT", "1")
        patch.setattr(run, "settle", keep)
        run_ok(*words(other))

    def overwrite(writer: RemoteWriter, prepared: Any) -> list[int]:
        if len(found) == 1:
            Objects(s3).write(overwritten, found[0])
        wrong = real(writer, prepared)
        found.append(wrong)
        return wrong

    monkeypatch.setattr(run, "settle", overwrite)
    run_ok(*words(s3))
    assert found[1:] == [[1], []]
    ours = answers_of(copied(s3, tmp_path / "back"))
    differing = [a != b for a, b in zip(ours, answers_of(calm), strict=True)]
    of_the_other = overwritten.startswith("progress")
    assert any(differing) == of_the_other
    assert any(a != b for a, b in zip(ours, answers_of(copied(other, tmp_path / "other")), strict=True))


@pytest.mark.parametrize("record", [b"{dam", b'{"file": "shards/00001.safetensors", "bytes": 1}'])
def test_a_damaged_record_is_written_again(s3, words, calm, tmp_path, record):
    run_until("shards/00002.safetensors", words(s3))
    Objects(s3).write("progress/00001.json", record)
    assert f"cache {s3}: complete" in run_ok(*words(s3))
    assert_same(copied(s3, tmp_path / "back"), calm)


def test_lost_answers_are_said_to_be_lost(s3, words, tmp_path):
    run_ok(*words(s3))
    back = copied(s3, tmp_path / "back")
    for name in ("target/frozen.safetensors", "shards/00001.safetensors"):
        Objects(s3).remove([name])
        assert_refused(run_cli(*words(s3)), 1, f"{s3}/{name} is missing")
        run_ok("sync", back, str(s3))
        assert "already complete" in run_ok(*words(s3))
    run_ok("verify", str(s3))
    Objects(s3).remove(["target/frozen.safetensors"])
    assert_refused(run_cli(*words(s3)), 1, f"{s3}/target/frozen.safetensors is missing", "dspark sync")
    Objects(s3).remove(["shards/00001.safetensors"])
    assert_refused(run_cli(*words(s3)), 1, f"{s3}/shards/00001.safetensors", "answers", f"remove {s3}")


def test_transformers_answers_first_and_captures_then(s3, fp32_target, machine, tmp_path, monkeypatch):
    data = make_conversations(tmp_path / "data.jsonl", count=6, seed=3)
    words = arguments(fp32_target, data, str(s3), max_new_tokens=8, temperature=0)
    run_ok(*words, "--regenerate")
    assert len(list(machine.glob("staging/*.answers.jsonl"))) == 1
    assert len(CacheReader(copied(s3, tmp_path / "back"))) == 6
    monkeypatch.setenv("DSPARK_LOCAL_CACHE", str(tmp_path / "another machine"))
    result = run_cli(*words, "--regenerate")
    assert "already complete" in result.stdout
    assert "answers first" not in result.stderr  # the first machine's are beside the cache
    other = [*words, "--regenerate", "--max-new-tokens", "9"]
    assert_refused(run_cli(*other), 2, "answers differ", f"and {s3}.answers.json and {s3}.answers.jsonl")
    monkeypatch.setenv("DSPARK_LOCAL_CACHE", str(tmp_path / "third machine"))
    folder, name = Objects(Address(str(s3).removesuffix("/cache"))), "cache.answers.jsonl"
    kept = folder.read(name)
    folder.write(name, kept.replace(b"assistant", b"assistant ", 1))  # another machine's, which was first
    monkeypatch.setattr(two_steps, "_fetch", lambda *_: None)  # and finished while this one answered
    assert_refused(run_cli(*words, "--regenerate"), 2, f"{s3}.answers.jsonl has other answers than")
    bucket = arguments(fp32_target, data, "s3://bucket", max_new_tokens=8)
    assert_refused(run_cli(*bucket, "--regenerate"), 2, "expected a folder in a bucket")


def elsewhere(tmp_path: Path, words: list[str | Path]) -> None:
    """Run a capture to its end on another machine, whose engine answers differently."""
    away = {"DSPARK_LOCAL_CACHE": str(tmp_path / "another machine"), "SALT": "1"}
    process = Dspark(tmp_path / "process", *words, **away)
    assert process.wait() == 0, process.err
    assert ": complete" in process.out, (process.out, process.err)


def test_who_was_silent_for_long_writes_over_nothing(s3, words, calm, tmp_path, monkeypatch):
    """Another machine took it for dead, inherited its shard, and completed the cache."""
    real, late = RemoteWriter.write_shard, []

    def write_shard(writer: RemoteWriter, shard: int, *rest: Any, **more: Any) -> None:
        if shard == 1 and not late:
            late.append(shard)
            objects = Objects(s3)
            workers = [entry.name for entry in objects.list("progress") if "/worker-" in entry.name]
            monkeypatch.setattr(RemoteWorker, "_touch", lambda _worker: None)
            objects.remove(workers)  # as if they had been silent for long
            elsewhere(tmp_path, words(s3))
        real(writer, shard, *rest, **more)

    monkeypatch.setattr(RemoteWriter, "write_shard", write_shard)
    run_ok(*words(s3))
    assert late
    answers = answers_of(copied(s3, tmp_path / "back"))
    assert any(a != b for a, b in zip(answers, answers_of(calm), strict=True))


def test_who_was_silent_keeps_off_a_shard_that_is_finished(s3, words, calm, tmp_path, monkeypatch):
    """Another machine inherited it and has finished it, but not the cache."""
    other, settle, real, objects = Address(f"{s3}-other"), run.settle, RemoteWriter.write_shard, Objects(s3)
    names = ["progress/answers-00001.jsonl", "shards/00001.safetensors", "progress/00001.json"]
    theirs: dict[str, bytes] = {}

    def keep(writer: RemoteWriter, prepared: Any) -> list[int]:
        theirs.update({name: Objects(other).read(name) for name in names})
        return settle(writer, prepared)

    with monkeypatch.context() as patch:
        patch.setenv("SALT", "1")
        patch.setattr(run, "settle", keep)
        run_ok(*words(other))

    def write_shard(writer: RemoteWriter, shard: int, *rest: Any, **more: Any) -> None:
        if shard == 1:
            monkeypatch.setattr(RemoteWorker, "_touch", lambda _worker: None)
            objects.remove([entry.name for entry in objects.list("progress") if "/worker-" in entry.name])
            heir = RemoteWorker(objects)
            assert heir.claim(claim_name(1))
            for name in names:
                objects.write(name, theirs[name])
            heir.release(claim_name(1))
        real(writer, shard, *rest, **more)

    monkeypatch.setattr(RemoteWriter, "write_shard", write_shard)
    run_ok(*words(s3))
    back = copied(s3, tmp_path / "back")
    assert (back / names[1]).read_bytes() == theirs[names[1]]
    assert (back / "shards/00000.safetensors").read_bytes() == (
        calm / "shards/00000.safetensors"
    ).read_bytes()


def test_what_was_not_uploaded_needs_its_claim(s3, words, calm, tmp_path, monkeypatch):
    """A machine is killed between a shard and its record, and starts again while another one has it."""
    real, again = RemoteWriter.write_shard, []
    run_until("progress/00001.json", words(s3))

    def write_shard(writer: RemoteWriter, shard: int, *rest: Any, **more: Any) -> None:
        if shard == 1 and not again:
            first = {"DSPARK_LOCAL_CACHE": str(tmp_path / "machine"), "SALT": "0"}
            again.append(Dspark(tmp_path / "again", *words(s3), "--worker", "1/2", **first))
            assert again[0].wait() == 0, again[0].err
        real(writer, shard, *rest, **more)

    monkeypatch.setattr(RemoteWriter, "write_shard", write_shard)
    monkeypatch.setenv("DSPARK_LOCAL_CACHE", str(tmp_path / "another machine"))
    monkeypatch.setenv("SALT", "1")
    run_ok(*words(s3), "--worker", "0/2")
    assert again
    run_ok(*words(s3))
    copied(s3, tmp_path / "back")


def test_a_store_without_tags_and_one_that_changes_them(s3, words, calm, tmp_path, monkeypatch):
    write = Objects.write
    for tag, place in (("", s3), ("other", Address(f"{s3}-other"))):
        with monkeypatch.context() as patch:
            patch.setattr(Objects, "write", lambda *args, tag=tag: (write(*args), tag)[1])
            if tag:
                assert_refused(run_cli(*words(place)), 1, "do not hold their answers, though written 3 times")
            else:
                run_ok(*words(place))
    assert_same(copied(s3, tmp_path / "back"), calm)


def test_who_looked_before_it_was_completed_takes_it(s3, words, tmp_path, monkeypatch):
    """Another machine completes the cache while this one reads all weights of the target."""
    for place in (s3, tmp_path / "cache"):
        real, done = PreparedCapture.full_identity, []

        def identity(prepared: PreparedCapture, place=place, real=real, done=done) -> Any:
            if not done:
                done.append(place)
                elsewhere(tmp_path, words(place))
            return real(prepared)

        with monkeypatch.context() as patch:
            patch.setattr(PreparedCapture, "full_identity", identity)
            assert "already complete, reused" in run_ok(*words(place))
        assert done
    assert "all good" in run_ok("verify", tmp_path / "cache")
