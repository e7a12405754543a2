"""Caches that lie to a capture that continues them: it finishes, or refuses in one line.

Beside the cache lies a folder that is nobody's business. Links lead there; nothing may be read from it into
the cache, written to it or removed from it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.cache import CacheReader
from pipeline.errors import CacheError, DSparkError, WriteError
from pipeline.files import partial_name, plain_size, publish_bytes, read_small
from tests.pipeline.handmade import seal
from tests.pipeline.written import MASKS, Writing, every_byte, fill, make_writing

pytestmark = pytest.mark.usefixtures("bounded_memory", "impatience")

Harm = Callable[[Path, Path], object]
"""What is done to a cache, given its path and that of the folder outside."""


@pytest.fixture
def impatience() -> Iterator[None]:
    """Whoever waits for a pipe that nobody writes to is woken up."""

    def wake(*_: object) -> None:
        raise AssertionError("waited for ever")

    before = signal.signal(signal.SIGALRM, wake)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def writing() -> Writing:
    return make_writing(MASKS)


@pytest.fixture(scope="module")
def whole(writing, tmp_path_factory) -> dict[str, bytes]:
    return every_byte(writing.write(tmp_path_factory.mktemp("whole") / "cache"))


def started(writing: Writing, path: Path) -> Path:
    """A capture that was stopped after its first shard."""
    writer = writing.open(path)
    writer.write_target({"config.json": b"{}"}, writing.frozen())
    writing.write_shard(writer, 0)
    return path


def damaged(writing: Writing, path: Path) -> Path:
    """A complete cache that lost a shard."""
    writing.write(path)
    (path / "shards/00001.safetensors").unlink()
    return path


STATES = {"started": started, "damaged": damaged}


def snapshot(folder: Path) -> dict[str, tuple]:
    """Everything below a folder: kind, time of the last change, and content."""
    found = {}
    for path in sorted(folder.rglob("*")):
        stat = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else None
        found[path.relative_to(folder).as_posix()] = (stat.st_mode, stat.st_mtime_ns, stat.st_size, content)
    return found


def go_on(writing: Writing, cache: Path, outside: Path, whole: dict[str, bytes]) -> str:
    """Continue the capture as often as a user would: it is whole in the end, or refused each time alike."""
    before = snapshot(outside)
    try:
        try:
            assert fill(writing, cache)
        finally:
            assert snapshot(outside) == before
    except DSparkError as error:
        message = str(error)
        assert len(message.splitlines()) == 1, message
        with pytest.raises(type(error)):
            fill(writing, cache)
        assert snapshot(outside) == before
        return message
    links = [path for path in cache.rglob("*") if path.is_symlink()]
    assert links == []
    assert every_byte(cache) == whole
    return ""


@pytest.fixture
def outside(tmp_path) -> Path:
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "precious").write_bytes(b"precious")
    os.mkfifo(folder / "pipe")
    return folder


# --- Links and other kinds of file ---------------------------------------------------------------


def link_folder(name: str, *, moved: bool) -> Harm:
    """A link for one of the cache's folders, to what was in it or to something else."""

    def harm(cache: Path, outside: Path) -> None:
        folder, target = cache / name, outside / name
        if moved and folder.exists():
            shutil.move(folder, target)
        else:
            shutil.rmtree(folder, ignore_errors=True)
            target.mkdir()
        dead = subprocess.Popen([sys.executable, "-c", ""])
        dead.wait()
        (target / partial_name("00001.safetensors", pid=dead.pid)).write_bytes(b"precious")
        (target / ".another.partial").write_bytes(b"precious")
        (target / "worker-x.json").write_bytes(b"precious")
        folder.symlink_to(target, target_is_directory=True)

    return harm


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("moved", [True, False])
@pytest.mark.parametrize("name", ["shards", "progress", "target"])
def test_a_folder_that_leads_out_of_the_cache_is_refused(
    tmp_path, outside, writing, whole, state, moved, name
):
    cache = STATES[state](writing, tmp_path / "cache")
    link_folder(name, moved=moved)(cache, outside)
    assert f"{name} is not a directory" in go_on(writing, cache, outside, whole)


@pytest.mark.parametrize("name", ["shards", "progress", "target"])
def test_a_folder_that_leads_out_of_a_complete_cache_is_refused(tmp_path, outside, writing, whole, name):
    """Nothing is left to be done there but to tidy, which must not happen elsewhere."""
    cache = writing.write(tmp_path / "cache")
    link_folder(name, moved=True)(cache, outside)
    assert f"{name} is not a directory" in go_on(writing, cache, outside, whole)


@pytest.mark.parametrize("name", ["shards", "progress", "target"])
def test_a_file_for_a_folder_is_refused(tmp_path, outside, writing, whole, name):
    cache = started(writing, tmp_path / "cache")
    shutil.rmtree(cache / name)
    (cache / name).write_bytes(b"")
    assert f"{name} is not a directory" in go_on(writing, cache, outside, whole)


def replace_by(make: Callable[[Path, Path], object]) -> Callable[[str], Harm]:
    def named(name: str) -> Harm:
        def harm(cache: Path, outside: Path) -> None:
            path = cache / name
            if path.exists():
                (outside / path.name).write_bytes(path.read_bytes())
                path.unlink()
            path.parent.mkdir(exist_ok=True)
            make(path, outside)

        return harm

    return named


KINDS = {
    "a link to what it was": replace_by(lambda path, outside: path.symlink_to(outside / path.name)),
    "a link to something else": replace_by(lambda path, outside: path.symlink_to(outside / "precious")),
    "a link to a pipe": replace_by(lambda path, outside: path.symlink_to(outside / "pipe")),
    "a link to nowhere": replace_by(lambda path, outside: path.symlink_to(outside / "nowhere")),
    "a link to itself": replace_by(lambda path, outside: path.symlink_to(path.name)),
    "a pipe": replace_by(lambda path, outside: os.mkfifo(path)),
    "a terabyte of nothing": replace_by(lambda path, outside: (path.touch(), os.truncate(path, 2**40))),
}
PUBLISHED = [
    "samples.arrow",
    "shards/00000.safetensors",
    "shards/00001.safetensors",
    "target/config.json",
    "target/frozen.safetensors",
    "progress/00000.json",
    "progress/00001.json",
    "progress/target.json",
    "progress/kept.json",
]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_file_that_is_no_plain_file_is_replaced_by_one(
    tmp_path, outside, writing, whole, state, kind, name
):
    cache = STATES[state](writing, tmp_path / "cache")
    KINDS[kind](name)(cache, outside)
    assert go_on(writing, cache, outside, whole) == ""


@pytest.mark.parametrize("kind", KINDS)
def test_a_manifest_that_is_no_plain_file_is_refused(tmp_path, outside, writing, whole, kind):
    cache = started(writing, tmp_path / "cache")
    KINDS[kind]("manifest.json")(cache, outside)
    assert go_on(writing, cache, outside, whole) != ""


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_folder_for_a_file_is_refused_or_gone_in_the_end(tmp_path, outside, writing, whole, name):
    cache = started(writing, tmp_path / "cache")
    replace_by(lambda path, outside: path.mkdir())(name)(cache, outside)
    message = go_on(writing, cache, outside, whole)
    assert message == "" if name == "progress/kept.json" else "can't be written" in message


def test_nothing_is_written_through_a_temporary_name(tmp_path, outside):
    """Whoever knows which process will write can lay a link where it will."""
    file = tmp_path / "file"
    before = snapshot(outside)
    partial = tmp_path / partial_name(f"file~{threading.get_native_id()}")
    seen = []
    for target in (outside / "precious", outside / "pipe", outside / "new"):
        partial.symlink_to(target)
        publish_bytes(file, b"data", step=lambda _: seen.append(partial.is_symlink()) or threading.Lock())
        assert file.read_bytes() == b"data"
        assert not file.is_symlink()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "outside"]
    assert seen
    assert not any(seen)  # that was the name
    assert snapshot(outside) == before
    partial.mkdir()
    with pytest.raises(WriteError, match="can't be written"):
        publish_bytes(file, b"other")
    assert file.read_bytes() == b"data"


def test_small_files_are_read_if_they_are_small_and_files(tmp_path, outside):
    file = tmp_path / "file"
    file.write_bytes(b"12345678")
    assert read_small(file, 8) == b"12345678"
    with pytest.raises(OSError, match="plain file of at most 7 bytes"):
        read_small(file, 7)
    (tmp_path / "link").symlink_to(file)
    for path in (tmp_path / "link", tmp_path / "nothing", outside, outside / "pipe"):
        with pytest.raises(OSError):  # noqa: PT011 - whatever the system says of it
            read_small(path, 8)
        assert plain_size(path) == -1
    assert plain_size(file) == 8
    assert plain_size(tmp_path / "a\0b") == -1


@pytest.mark.parametrize(
    "name", [".x~{place}~².partial", ".x~{place}~{huge}.partial", ".x~{place}~0.partial"]
)
def test_temporary_names_of_no_process_are_no_crash(tmp_path, outside, writing, whole, name):
    cache = started(writing, tmp_path / "cache")
    place = partial_name("x").split("~")[1]
    for folder in ("shards", "progress", "target"):
        (cache / folder / name.format(place=place, huge="9" * 150)).write_bytes(b"")
    assert go_on(writing, cache, outside, whole) == ""


# --- Records -------------------------------------------------------------------------------------

TEXTS = {
    "empty": b"",
    "not JSON": b"\x80\x04\x95",
    "cut": b'{"file": "sha',
    "null": b"null",
    "a number": b"7",
    "a list": b"[[]]",
    "an empty object": b"{}",
    "an unknown key": b'{"more": 1}',
    "a key of a megabyte": b'{"' + b"x" * 2**20 + b'": 1}',
    "nested 100,000 deep": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "nested 900 deep": b'{"bytes":' + b"[" * 900 + b"]" * 900 + b"}",
    "a number of 10,000 digits": b'{"bytes": ' + b"9" * 10_000 + b"}",
    "not UTF-8": b'{"file": "\xff"}',
}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["00000", "kept", "target"])
@pytest.mark.parametrize("state", STATES)
def test_a_record_of_nonsense_is_no_record(tmp_path, outside, writing, whole, state, name, text):
    cache = STATES[state](writing, tmp_path / "cache")
    (cache / "progress").mkdir(exist_ok=True)
    (cache / f"progress/{name}.json").write_bytes(TEXTS[text])
    assert go_on(writing, cache, outside, whole) == ""


def edit(name: str, change: Callable[[dict, Path], object]) -> Harm:
    def harm(cache: Path, outside: Path) -> None:
        path = cache / f"progress/{name}.json"
        values = json.loads(path.read_text())
        change(values, outside)
        path.write_text(json.dumps(values))

    return harm


def change_file(**values: object) -> Harm:
    """The first file that the target's record names."""
    return edit("target", lambda record, _: record["files"][0].update(values))


def name_outside(absolute: bool) -> Harm:
    """The target's record names a file that is there, with its size, but not in the cache."""

    def change(record: dict, outside: Path) -> None:
        name = str(outside / "precious") if absolute else "target/../../outside/precious"
        record["files"].append({"file": name, "bytes": 8, "sha256": "ab" * 32})

    return edit("target", change)


RECORD_LIES: dict[str, Harm] = {
    "hash of nothing": edit("00000", lambda r, _: r.update(sha256="")),
    "hash in upper case": edit("00000", lambda r, _: r.update(sha256="AB" * 32)),
    "hash with a line break": edit("00000", lambda r, _: r.update(sha256="ab" * 32 + "\n")),
    "hash a number": edit("00000", lambda r, _: r.update(sha256=7)),
    "size negative": edit("00000", lambda r, _: r.update(bytes=-1)),
    "size huge": edit("00000", lambda r, _: r.update(bytes=2**80)),
    "size a boolean": edit("00000", lambda r, _: r.update(bytes=True)),
    "file above": edit("00000", lambda r, _: r.update(file="../outside/precious", bytes=8)),
    "file absolute": edit("00000", lambda r, out: r.update(file=str(out / "precious"), bytes=8)),
    "measured text": edit("00000", lambda r, _: r.update(measured={"teacher_tv": ["x"]})),
    "measured a list": edit("00000", lambda r, _: r.update(measured=[0.5])),
    "measured beyond any float": edit("00000", lambda r, _: r.update(measured={"teacher_tv": [10**400]})),
    "measured of two megabytes": edit("00000", lambda r, _: r.update(measured={"x": [0.5] * 2**19})),
    "target's file above": name_outside(absolute=False),
    "target's file absolute": name_outside(absolute=True),
    "target's file a shard": change_file(file="shards/00000.safetensors"),
    "target's file the manifest": change_file(file="manifest.json"),
    "target's file weights": change_file(file="target/model.safetensors"),
    "target's file with a line break": change_file(file="target/a\nb"),
    "target's file with a NUL": change_file(file="target/a\0b"),
    "target's file the folder": change_file(file="target/."),
    "target's file twice": edit("target", lambda r, _: r["files"].append(r["files"][0])),
    "target's file without a hash": change_file(sha256="x"),
    "target's file of a negative size": change_file(bytes=-1),
    "target without its weights": edit("target", lambda r, _: r["files"].pop()),
    "target without files": edit("target", lambda r, _: r.update(files=[])),
    "target proved by text": edit("target", lambda r, _: r.update(proof={"x": "y"})),
}


@pytest.mark.parametrize("name", RECORD_LIES)
def test_a_record_that_lies_is_no_record(tmp_path, outside, writing, whole, name):
    cache = started(writing, tmp_path / "cache")
    RECORD_LIES[name](cache, outside)
    assert go_on(writing, cache, outside, whole) == ""


@pytest.mark.parametrize("name", ["00000", "target"])
def test_a_hash_that_lies_is_found_by_verify(tmp_path, writing, name):
    """Continuing believes a record whose file has its size; hashing every file again would cost hours."""
    cache = started(writing, tmp_path / "cache")
    change = change_file(sha256="ab" * 32)
    if name == "00000":
        change = edit("00000", lambda record, _: record.update(sha256="ab" * 32))
    change(cache, cache)
    assert fill(writing, cache)
    assert CacheReader(cache).verify() == [
        "shards/00000.safetensors" if name == "00000" else "target/config.json"
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e308, -0.0])
@pytest.mark.parametrize("key", ["teacher_tv", "a\nb", "\ud800", "", "x" * 10_000])
def test_whatever_was_measured_the_cache_can_be_finished_and_opened(tmp_path, writing, key, value):
    cache = started(writing, tmp_path / "cache")
    edit("00000", lambda r, _: r.update(measured={key: [value, value, 0.5]}))(cache, cache)
    assert fill(writing, cache)
    assert len(CacheReader(cache)) == len(MASKS)
    assert writing.open(cache).complete


def keep(change: Callable[[dict], object]) -> Harm:
    """A damaged cache that was reopened, as it was left then; its shard 0 was kept."""

    def harm(cache: Path, outside: Path) -> None:
        path = cache / "progress/kept.json"
        values = json.loads(path.read_text())
        assert values["bytes"][0] == (cache / "shards/00000.safetensors").stat().st_size
        change(values)
        path.write_text(json.dumps(values))

    return harm


KEPT_LIES: dict[str, Harm] = {
    "a shard too few": keep(lambda k: (k["bytes"].pop(), k["sha256"].pop())),
    "a shard too many": keep(lambda k: (k["bytes"].append(1), k["sha256"].append("ab" * 32))),
    "columns of different length": keep(lambda k: k["bytes"].pop()),
    "sizes negative": keep(lambda k: k.update(bytes=[-1] * len(k["bytes"]))),
    "sizes huge": keep(lambda k: k.update(bytes=[2**80] * len(k["bytes"]))),
    "sizes floats": keep(lambda k: k.update(bytes=[float(n) for n in k["bytes"]])),
    "hashes of nonsense": keep(lambda k: k.update(sha256=["../x"] * len(k["sha256"]))),
    "a hash a number": keep(lambda k: k["sha256"].__setitem__(0, 1)),
    "a shard that is not there": keep(lambda k: k["bytes"].__setitem__(1, 300)),
    "no columns": keep(dict.clear),
}


@pytest.mark.parametrize("name", KEPT_LIES)
def test_a_list_of_kept_shards_that_lies_keeps_nothing_wrong(tmp_path, outside, writing, whole, name):
    cache = damaged(writing, tmp_path / "cache")
    writing.open(cache)  # reopened, and stopped before anything was written
    KEPT_LIES[name](cache, outside)
    assert go_on(writing, cache, outside, whole) == ""


# --- Claims, workers and strangers ---------------------------------------------------------------


def test_strangers_in_progress_are_gone_in_the_end(tmp_path, outside, writing, whole):
    cache = started(writing, tmp_path / "cache")
    progress = cache / "progress"
    for name in ("00001.claim", "target.claim", "worker-x.json", "99999.json", "-1.json", "x" * 200, "\n"):
        (progress / name).write_bytes(b"\x80nonsense")
    (progress / "away").symlink_to(outside, target_is_directory=True)
    (progress / "00002.claim").symlink_to(outside / "precious")
    os.mkfifo(progress / "00003.claim")
    (progress / "folder/folder").mkdir(parents=True)
    (progress / "folder/away").symlink_to(outside / "precious")
    assert go_on(writing, cache, outside, whole) == ""


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, lambda path: path.symlink_to("../outside")])
def test_the_name_that_progress_goes_by_at_the_end_may_be_taken(tmp_path, outside, writing, whole, make):
    cache = started(writing, tmp_path / "cache")
    make(cache / ".progress-done")
    before = snapshot(outside)
    assert fill(writing, cache)
    assert snapshot(outside) == before
    assert not (cache / "progress").exists()
    assert len(CacheReader(cache)) == len(MASKS)


@pytest.mark.parametrize("state", STATES)
def test_a_manifest_with_another_plan_for_the_same_data_is_refused(tmp_path, writing, state):
    """Its shards would have other sizes than what is written into them."""
    cache = STATES[state](writing, tmp_path / "cache")
    text = (cache / "manifest.json").read_bytes()
    samples = json.dumps({"samples": json.loads(text)["plan"]["samples"]}).strip("{}").encode()
    assert text.count(samples) == 1
    before, name, after = text.replace(samples, samples.replace(b"2", b"3", 1)).partition(b'"checksum": "')
    (cache / "manifest.json").write_bytes(seal(before + name + b"0" * 64 + after[64:]))
    for _ in range(2):
        with pytest.raises(CacheError, match="its plan is not that of its samples"):
            writing.open(cache)
