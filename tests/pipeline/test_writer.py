"""Resume at any point, refusals, and disks that fail."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import files
from pipeline.cache import CacheReader, CacheWriter
from pipeline.cache import writer as writer_module
from pipeline.cache.progress.records import Records
from pipeline.errors import CacheError, WriteError
from pipeline.files import partial_name
from tests.conftest import capture_arguments, run_cli
from tests.pipeline.written import (
    MASKS,
    Writing,
    every_byte,
    fill,
    make_identity,
    make_sample,
    make_writing,
    read_all,
)

QUICK = settings(max_examples=20)

# A sample's mask ends supervised and has two supervised tokens side by side somewhere.
masks = st.tuples(
    st.lists(st.integers(0, 1), max_size=5), st.just([1, 1]), st.lists(st.integers(0, 1), max_size=4)
).map(lambda parts: [*parts[0], *parts[1], *parts[2], *([1] if parts[2] else [])])


def in_bytes(pieces: Iterable[bytes | memoryview]) -> Iterator[memoryview]:
    """In the place of `files._blocks`: what is written, some bytes at a time."""
    for piece in pieces:
        view = memoryview(piece).cast("B")
        for start in range(0, len(view), 100):
            yield view[start : start + 100]


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
            writing.write_shard(writer, shard)
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
        writing.write_shard((one, two)[n % 2], shard)
    assert two.pending() == one.pending() == []
    writing.finish(two)
    assert every_byte(path) == whole


def test_only_what_is_pending_is_written_again(scratch):
    writing, path = make_writing(MASKS), scratch()
    writer = writing.open(path)
    writing.write_shard(writer, 1)
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
    writing.write_shard(writer, 0)
    with pytest.raises(CacheError, match=rf"incomplete \(1 of {len(writing.plan)}"):
        CacheReader(path)
    assert json.loads((path / "manifest.json").read_text())["status"] == "incomplete"
    assert writer.finalise() is None  # neither shard 1 nor the target is written
    for shard in writer.pending():
        writing.write_shard(writer, shard)
    assert writer.finalise() is None  # the target is not
    assert json.loads((path / "manifest.json").read_text())["status"] == "incomplete"
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
    writing.write_shard(writing.open(path), 0)
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
    writing.write_shard(writing.open(path), 0)
    (path / folder / partial_name(name, pid=dead_pid)).write_bytes(b"half a file")
    writing.finish(writing.open(path))
    assert every_byte(path).keys() == whole.keys()
    assert every_byte(path) == whole


def test_a_kill_during_the_very_first_write_does_not_lock_the_directory(scratch, dead_pid):
    """The first thing written is the manifest; killed there, the same command must be able to start."""
    writing, path = make_writing(MASKS), scratch()
    path.mkdir()
    (path / partial_name("manifest.json", pid=dead_pid)).write_bytes(b'{"format": "dspark-ca')
    writing.finish(writing.open(path))
    assert len(CacheReader(path)) == len(MASKS)


def test_a_write_in_progress_survives_another_writer_that_opens(scratch, monkeypatch):
    """Workers join at any time; a newcomer must not take away what another is writing."""
    writing, path = make_writing(MASKS), scratch()
    writer = writing.open(path)

    def cut_while_another_opens(pieces: Iterable[bytes | memoryview]) -> Iterator[memoryview]:
        for block in in_bytes(pieces):
            yield block
            with monkeypatch.context() as patch:
                patch.setattr(files, "_blocks", in_bytes)
                writing.open(path)

    with monkeypatch.context() as patch:
        patch.setattr(files, "_blocks", cut_while_another_opens)
        writing.write_shard(writer, 0)
    assert 0 not in writing.open(path).pending()


# --- Many at once --------------------------------------------------------------------------------


@pytest.mark.parametrize("round_", range(5))
def test_threads_that_start_write_and_finish_at_once_make_one_cache(scratch, round_):
    """Each with a writer of its own, in a directory that none of them finds, and without any claims."""
    writing = make_writing(MASKS)
    whole = every_byte(writing.write(scratch()))
    path = scratch()
    barrier = threading.Barrier(4)
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(fill, writing, path, barrier.wait) for _ in range(4)]
        assert [future.result(timeout=60) for future in futures] == [True] * 4
    assert every_byte(path) == whole
    assert sorted(p.name for p in path.iterdir()) == ["manifest.json", "samples.arrow", "shards", "target"]


PROCESS = """
import sys
from pathlib import Path
from tests.pipeline.written import MASKS, fill, make_writing
writing = make_writing(MASKS)
print("ready", flush=True)
for line in sys.stdin:
    print(fill(writing, Path(line.rstrip("\\n"))), flush=True)
"""


def test_processes_that_start_write_and_finish_at_once_make_one_cache(scratch):
    whole = every_byte(make_writing(MASKS).write(scratch()))
    command = [sys.executable, "-c", PROCESS]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
    children = [subprocess.Popen(command, cwd=Path(__file__).parents[2], **pipes) for _ in range(2)]
    try:
        assert [child.stdout.readline() for child in children] == ["ready\n"] * 2
        for _ in range(10):
            path = scratch()
            for child in children:
                print(path, file=child.stdin)
            assert [child.stdout.readline() for child in children] == ["True\n"] * 2
            assert every_byte(path) == whole
            left = ["manifest.json", "samples.arrow", "shards", "target"]
            assert sorted(p.name for p in path.iterdir()) == left
    finally:
        for child in children:
            child.communicate(timeout=60)


def all_written(writing: Writing, path: Path) -> CacheWriter:
    """A writer that has nothing left to do but to finalise."""
    writer = writing.open(path)
    writer.write_target({"config.json": b"{}"}, writing.frozen())
    for shard in writer.pending():
        writing.write_shard(writer, shard)
    return writer


def test_two_that_finalise_at_once_both_have_the_manifest(scratch):
    writing = make_writing(MASKS)
    whole = every_byte(writing.write(scratch()))
    for _ in range(10):
        path = scratch()
        writers = [all_written(writing, path), writing.open(path)]
        barrier = threading.Barrier(2)

        def finalise(writer: CacheWriter, barrier: threading.Barrier = barrier) -> bytes:
            barrier.wait()
            return writer.finalise().to_json()

        with ThreadPoolExecutor(2) as pool:
            manifests = [f.result(timeout=60) for f in [pool.submit(finalise, w) for w in writers]]
        assert manifests == [whole["manifest.json"]] * 2
        assert every_byte(path) == whole


def test_one_that_finalises_later_has_the_manifest_of_the_first(scratch):
    writing, path = make_writing(MASKS), scratch()
    one = all_written(writing, path)
    two = writing.open(path)
    assert one.finalise() is not None
    before = every_byte(path)
    assert not two.complete
    assert two.pending() == []  # nothing is to be done again
    assert two.finalise().to_json() == one.manifest.to_json()
    assert two.complete
    assert one.finalise().to_json() == before["manifest.json"]
    assert every_byte(path) == before


@pytest.mark.parametrize("step", ["mkdir", "remove_partials", "read_kept", "_write_index", "read_manifest"])
def test_a_cache_that_is_finished_while_another_joins_stays_as_it_is(scratch, monkeypatch, step):
    """The newcomer is stopped before each step of joining in turn, and the cache is finished meanwhile."""
    writing = make_writing(MASKS)
    whole = every_byte(writing.write(scratch()))
    owners = {"mkdir": Path, "remove_partials": files}
    owners |= {"read_manifest": writer_module, "read_kept": Records}
    owner = owners.get(step, CacheWriter)
    real, calls = getattr(owner, step), 0
    for stop in range(6):
        path = scratch()
        one, calls = all_written(writing, path), 0

        def before(*args: object, one=one, stop=stop, **kwargs: object) -> object:
            nonlocal calls
            if calls == stop:
                calls += 1  # whatever `one` itself calls
                with monkeypatch.context() as patch:
                    patch.setattr(owner, step, real)
                    assert one.finalise() is not None
            calls += 1
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, step, before)
            two = writing.open(path)
        if calls <= stop:
            break  # joining has no more of these steps
        assert two.pending() == []
        assert two.finalise().to_json() == one.manifest.to_json()
        assert every_byte(path) == whole
        assert not [entry for entry in path.iterdir() if entry.name.startswith((".", "progress"))]
    assert stop > 0  # it has one at least


def test_what_another_wrote_and_finished_meanwhile_is_no_error(scratch, monkeypatch):
    """Two owners of one shard write the same: the slower finds its folder gone, or its file tidied away."""
    writing = make_writing(MASKS)
    whole = every_byte(writing.write(scratch()))

    def finish_first(pieces: Iterable[bytes | memoryview]) -> Iterator[memoryview]:
        with monkeypatch.context() as patch:
            patch.setattr(files, "_blocks", in_bytes)
            writing.finish(writing.open(path))
        return in_bytes(pieces)

    for slow in (
        lambda writer: writing.write_shard(writer, 1),
        lambda writer: writer.write_target({"config.json": b"{}"}, writing.frozen()),
    ):
        path = scratch()
        writer = writing.open(path)
        with monkeypatch.context() as patch:
            patch.setattr(files, "_blocks", finish_first)
            slow(writer)
        assert writer.pending() == []
        assert writer.finalise().status == "complete"
        assert every_byte(path) == whole


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
        writing.write_shard(writing.open(path), 0)
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
    writing.write_shard(writer, 0)

    def fail(pieces: Iterable[bytes | memoryview]) -> Iterator[memoryview]:
        yield next(in_bytes(pieces))
        assert len(every_byte(path)) == before + 1  # half of the file is there
        raise OSError(28, "No space left on device")

    before = len(every_byte(path))
    with monkeypatch.context() as patch:
        patch.setattr(files, "_blocks", fail)
        with pytest.raises(WriteError, match="No space left"):
            writing.write_shard(writer, 1)
    assert_nothing_half_written(path, writing, done=[0])
    writing.finish(writing.open(path))
    assert every_byte(path) == whole


def test_a_shard_that_is_written_is_not_written_again(scratch, monkeypatch):
    """By a second owner, of other hardware perhaps: the record must stay that of the file."""
    writing, path = make_writing(MASKS), scratch()
    writer = writing.open(path)
    writing.write_shard(writer, 0)
    before = every_byte(path)

    def fail(descriptor: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        writing.write_shard(writer, 0)
    assert every_byte(path) == before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs RLIMIT_FSIZE")
def test_a_shard_that_the_file_system_refuses_leaves_nothing_to_see(scratch):
    """The kernel stops the write itself. Python ignores the signal, so that it becomes an error."""
    layers = (0, 2)
    samples = [make_sample([1] * 4000, layers, 4, seed=0), make_sample([1, 1], layers, 4, seed=1)]
    writing, path = Writing(samples, make_identity(layers)), scratch()
    writer = writing.open(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # the shard has about 100,000 bytes
    try:
        with pytest.raises(WriteError, match=r"00000.safetensors can't be written \(File too large\)"):
            writing.write_shard(writer, 0)
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
        with pytest.raises(WriteError, match="Input/output error"):
            writing.finish(writer)
    with pytest.raises(CacheError, match="incomplete"):
        CacheReader(path)
    writing.finish(writing.open(path))
    assert every_byte(path) == whole
