"""Resume at any point, refusals, and disks that fail."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save_file

from pipeline.cache import CacheReader
from pipeline.errors import CacheError
from tests.conftest import capture_arguments, run_cli
from tests.pipeline.written import (
    MASKS,
    Writing,
    every_byte,
    make_identity,
    make_sample,
    make_writing,
    read_all,
)

QUICK = settings(max_examples=20, deadline=None, database=None, derandomize=True)

# A sample's mask ends supervised and has two supervised tokens side by side somewhere.
masks = st.tuples(
    st.lists(st.integers(0, 1), max_size=5), st.just([1, 1]), st.lists(st.integers(0, 1), max_size=4)
).map(lambda parts: [*parts[0], *parts[1], *parts[2], *([1] if parts[2] else [])])


# --- Resume --------------------------------------------------------------------------------------


@QUICK
@given(st.lists(masks, min_size=1, max_size=8), st.integers(2, 12), st.randoms(use_true_random=False))
def test_a_killed_capture_continues_to_the_same_bytes(tmp_path_factory, samples, limit, random):
    """Several writers, each killed after some shards of its choice; the last one finishes."""
    writing = make_writing(samples, limit=limit)
    whole = every_byte(writing.write(tmp_path_factory.mktemp("writer") / "cache"))
    path = tmp_path_factory.mktemp("writer") / "cache"
    for _ in range(random.randint(1, 3)):
        writer = writing.open(path)
        pending = writer.pending()
        for shard in random.sample(pending, random.randint(0, len(pending))):
            writer.write_shard(shard, writing.tensors(shard))
        del writer
    writer = writing.open(path)
    assert not writer.complete
    writing.finish(writer)
    assert writer.complete
    assert every_byte(path) == whole


def test_writers_side_by_side_fill_one_cache(scratch):
    """Two processes that opened the cache together write different shards; either may finish it."""
    writing = make_writing(MASKS)
    whole = every_byte(writing.write(scratch()))
    path = scratch()
    one, two = writing.open(path), writing.open(path)
    shards = one.pending()
    assert len(shards) >= 3
    for n, shard in enumerate(reversed(shards)):
        (one, two)[n % 2].write_shard(shard, writing.tensors(shard))
    assert two.pending() == one.pending() == []
    writing.finish(two)
    assert every_byte(path) == whole


def test_only_what_is_pending_is_written_again(scratch):
    writing, path = make_writing(MASKS), scratch()
    writer = writing.open(path)
    writer.write_shard(1, writing.tensors(1))
    before = (path / "shards/00001.safetensors").stat().st_mtime_ns
    again = writing.open(path)
    assert 1 not in again.pending()
    assert len(again.pending()) == len(writing.plan) - 1
    writing.finish(again)
    assert (path / "shards/00001.safetensors").stat().st_mtime_ns == before


def test_a_complete_cache_is_left_alone(scratch):
    writing, path = make_writing(MASKS), scratch()
    whole = every_byte(writing.write(path))
    assert writing.open(path).complete
    assert every_byte(path) == whole


def test_no_cache_can_be_opened_before_it_is_complete(scratch):
    writing, path = make_writing(MASKS), scratch()
    writer = writing.open(path)
    writer.write_shard(0, writing.tensors(0))
    with pytest.raises(CacheError, match=rf"incomplete \(1 of {len(writing.plan)}"):
        CacheReader(path)
    assert json.loads((path / "manifest.json").read_text())["status"] == "incomplete"
    with pytest.raises(CacheError, match="shard 1 is not written"):
        writer.finalise({})
    writing.finish(writer)
    assert not (path / "progress").exists()
    assert len(CacheReader(path)) == len(MASKS)


def shorten(path: Path) -> None:
    shard = path / "shards/00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])


def record(**values: object):
    def harm(path: Path) -> None:
        file = path / "progress/00000.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return harm


def raw_record(data: bytes):
    return lambda path: (path / "progress/00000.json").write_bytes(data) and None


HARMS = {
    "shard gone": lambda path: (path / "shards/00000.safetensors").unlink(),
    "shard cut": shorten,
    "record gone": lambda path: (path / "progress/00000.json").unlink(),
    "record cut": raw_record(b'{"file": "shards/00000.saf'),
    "record empty": raw_record(b""),
    "record not JSON": raw_record(b"\x80\x04."),
    "record nested deep": raw_record(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "record a list": raw_record(b"[1]"),
    "record of another shard": record(file="shards/00001.safetensors"),
    "record of a file outside": record(file="../x"),
    "record of another size": record(bytes=1),
    "record with an unknown key": record(more=1),
    "record with a size of text": record(bytes="8"),
}


@pytest.mark.parametrize("name", HARMS)
def test_a_shard_without_a_matching_record_is_written_again(scratch, name):
    writing = make_writing(MASKS)
    whole = every_byte(writing.write(scratch()))
    path = scratch()
    writing.open(path).write_shard(0, writing.tensors(0))
    HARMS[name](path)
    writer = writing.open(path)
    assert 0 in writer.pending()
    writing.finish(writer)
    assert every_byte(path) == whole


def test_an_index_lost_with_the_crash_is_written_again(scratch):
    writing = make_writing(MASKS)
    whole = every_byte(writing.write(scratch()))
    path = scratch()
    writing.open(path)
    (path / "samples.arrow").unlink()
    shutil.rmtree(path / "shards")
    writing.finish(writing.open(path))
    assert every_byte(path) == whole


@pytest.fixture(scope="module")
def dead_pid() -> int:
    """The id of a process that is no more, as a killed capture's is."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        (".", "manifest.json"),
        (".", "samples.arrow"),
        ("shards", "00000.safetensors"),
        ("progress", "00000.json"),
        ("target", "frozen.safetensors"),
    ],
)
def test_what_a_kill_left_half_written_is_not_in_the_finished_cache(scratch, dead_pid, folder, name):
    """SIGKILL leaves the temporary file of whatever was being written; rule 17 lists every file there is."""
    writing = make_writing(MASKS)
    whole = every_byte(writing.write(scratch()))
    path = scratch()
    writing.open(path).write_shard(0, writing.tensors(0))
    (path / folder / f".{name}~{socket.gethostname()}~{dead_pid}.partial").write_bytes(b"half a file")
    writing.finish(writing.open(path))
    assert every_byte(path).keys() == whole.keys()
    assert every_byte(path) == whole


def test_a_kill_during_the_very_first_write_does_not_lock_the_directory(scratch, dead_pid):
    """The first thing written is the manifest; killed there, the same command must be able to start."""
    writing, path = make_writing(MASKS), scratch()
    path.mkdir()
    (path / f".manifest.json~{socket.gethostname()}~{dead_pid}.partial").write_bytes(b'{"format": "dspark-ca')
    writing.finish(writing.open(path))
    assert len(CacheReader(path)) == len(MASKS)


def test_a_write_in_progress_survives_another_writer_that_opens(scratch, monkeypatch):
    """Workers join at any time; a newcomer must not take away what another is writing."""
    writing, path = make_writing(MASKS), scratch()
    writer = writing.open(path)

    def save_while_another_opens(tensors: dict, name: str) -> None:
        save_file(tensors, name)
        writing.open(path)

    monkeypatch.setattr("pipeline.cache.writer.save_file", save_while_another_opens)
    writer.write_shard(0, writing.tensors(0))
    monkeypatch.undo()
    assert 0 not in writing.open(path).pending()


# --- Refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["incomplete", "complete"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers": (0, 3)}, ["features.layer_ids", "(0, 2)", "(0, 3)"]),
        ({"shard_tokens": 11}, ["shard_tokens", "10", "11"]),
        ({"weights": "00" * 32}, ["target.weights", "ab" * 32, "00" * 32]),
        ({"dtype": "float32"}, ["target.dtype", "bfloat16", "float32"]),
        ({"final_logit_softcapping": 30.0}, ["target.final_logit_softcapping", "None", "30.0"]),
    ],
)
def test_another_identity_is_refused_naming_the_field_and_both_values(scratch, state, change, words):
    writing, path = make_writing(MASKS), scratch()
    if state == "complete":
        writing.write(path)
    else:
        writing.open(path).write_shard(0, writing.tensors(0))
    before = every_byte(path)
    layers = change.get("layers", (0, 2))
    made = [make_sample(mask, layers, 4, seed=i) for i, mask in enumerate(MASKS)]
    with pytest.raises(CacheError) as caught:
        Writing(made, make_identity(**{"layers": layers, **change})).open(path)
    for word in words:
        assert word in str(caught.value)
    assert "target.model_type" not in str(caught.value)  # what agrees is not named
    assert len(str(caught.value).splitlines()) == 1
    assert every_byte(path) == before


def test_every_field_that_differs_is_named(scratch):
    writing, path = make_writing(MASKS), scratch()
    writing.open(path)
    other = dataclasses.replace(make_identity(weights="00" * 32, dtype="float32"), batch_tokens=64)
    writing.identity = other
    with pytest.raises(CacheError, match=r"target\.weights.*target\.dtype.*batch_tokens"):
        writing.open(path)


@pytest.mark.parametrize("name", ["notes.txt", "model.safetensors", ".hidden", "shards/00000.safetensors"])
def test_a_directory_with_other_files_is_refused_and_left_alone(scratch, name):
    path = scratch()
    (path / name).parent.mkdir(parents=True)
    (path / name).write_bytes(b"precious")
    with pytest.raises(CacheError, match="not empty"):
        make_writing(MASKS).open(path)
    assert every_byte(path) == {name: b"precious"}


def test_an_empty_directory_is_taken(scratch):
    path = scratch()
    path.mkdir()
    make_writing(MASKS).write(path)
    assert len(CacheReader(path)) == len(MASKS)


def test_a_path_that_is_a_file_is_refused(scratch):
    path = scratch()
    path.write_bytes(b"precious")
    with pytest.raises(CacheError):
        make_writing(MASKS).open(path)
    assert path.read_bytes() == b"precious"


@pytest.mark.parametrize("data", [b"{}", b"not JSON", b'{"format": "dspark-cache", "format_version": 2}'])
def test_a_manifest_of_something_else_is_refused_and_left_alone(scratch, data):
    path = scratch()
    path.mkdir()
    (path / "manifest.json").write_bytes(data)
    with pytest.raises(CacheError):
        make_writing(MASKS).open(path)
    assert every_byte(path) == {"manifest.json": data}


def test_a_damaged_cache_is_repaired_by_the_remedy_that_the_error_names(
    cache_dir, target_dir, data_file, tmp_path
):
    """The reader says "capture again": the same command must then not call the cache finished."""
    cache = shutil.copytree(cache_dir, tmp_path / "cache")
    whole = read_all(cache)
    (cache / "shards/00001.safetensors").unlink()
    reader = CacheReader(cache)
    for look in (reader.check_shards, lambda: [reader.read(i) for i in range(len(reader))]):
        with pytest.raises(CacheError, match=r"00001.safetensors is damaged.*capture again"):
            look()
    result = run_cli(*capture_arguments(target_dir, data_file, cache))
    assert result.exit_code == 0, result.output
    assert read_all(cache) == whole


# --- A disk that fails ---------------------------------------------------------------------------


def assert_nothing_half_written(path: Path, writing: Writing, done: list[int]) -> None:
    names = [n for n in every_byte(path) if n.startswith(("shards/", "progress/"))]
    assert sorted(names) == sorted(
        [f"shards/{i:05d}.safetensors" for i in done] + [f"progress/{i:05d}.json" for i in done]
    )
    assert not any("partial" in name for name in every_byte(path))
    assert writing.open(path).pending() == [i for i in range(len(writing.plan)) if i not in done]


def test_a_write_that_fails_half_way_leaves_nothing_to_see(scratch, monkeypatch):
    writing = make_writing(MASKS)
    whole = every_byte(writing.write(scratch()))
    path = scratch()
    writer = writing.open(path)
    writer.write_shard(0, writing.tensors(0))

    def fail(tensors: dict, name: str) -> None:
        Path(name).write_bytes(b"half a shard")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.cache.writer.save_file", fail)
        with pytest.raises((OSError, CacheError), match="No space left"):
            writer.write_shard(1, writing.tensors(1))
    assert_nothing_half_written(path, writing, done=[0])
    writing.finish(writing.open(path))
    assert every_byte(path) == whole


def test_a_shard_rewritten_on_a_failing_disk_stays_as_it_was(scratch, monkeypatch):
    writing, path = make_writing(MASKS), scratch()
    writer = writing.open(path)
    writer.write_shard(0, writing.tensors(0))
    before = every_byte(path)

    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises((OSError, CacheError), match="Input/output error"):
            writer.write_shard(0, writing.tensors(0))
    assert every_byte(path) == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs RLIMIT_FSIZE")
def test_a_shard_that_the_file_system_refuses_leaves_nothing_to_see(scratch):
    """The kernel stops the write itself. Python ignores the signal, so that it becomes an error."""
    layers = (0, 2)
    samples = [make_sample([1] * 4000, layers, 4, seed=0), make_sample([1, 1], layers, 4, seed=1)]
    writing, path = Writing(samples, make_identity(layers)), scratch()
    writer = writing.open(path)
    tensors = writing.tensors(0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # the shard has about 100,000 bytes
    try:
        with pytest.raises((OSError, SafetensorError, CacheError)):
            writer.write_shard(0, tensors)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert_nothing_half_written(path, writing, done=[])
    writing.finish(writing.open(path))
    assert len(CacheReader(path)) == 2


def test_a_failing_last_step_leaves_an_incomplete_cache_that_can_be_finished(scratch, monkeypatch):
    writing = make_writing(MASKS)
    whole = every_byte(writing.write(scratch()))
    path = scratch()
    writer = writing.open(path)

    def fail(self: Path, target: Path) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        real = Path.replace
        patch.setattr(
            Path, "replace", lambda self, to: (fail if to.name == "manifest.json" else real)(self, to)
        )
        with pytest.raises((OSError, CacheError), match="Input/output error"):
            writing.finish(writer)
    with pytest.raises(CacheError, match="incomplete"):
        CacheReader(path)
    writing.finish(writing.open(path))
    assert every_byte(path) == whole
