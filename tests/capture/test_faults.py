"""Killed, stopped, out of disk: the same command continues, and ends with the bytes of an undisturbed run."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.cache import CacheReader, read_manifest
from pipeline.errors import CacheError
from tests import machine
from tests.capture.conftest import arguments, tree
from tests.conftest import assert_refused, run_cli, run_ok
from tests.processes import Dspark, die_at, finished_shards, leftovers, small_files_only
from tests.tiny import make_conversations

SMALL = {"shard_tokens": 64, "batch_tokens": 64}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_conversations(tmp_path_factory.mktemp("data") / "chats.jsonl", count=50, seed=6)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, target_dir, data) -> Path:
    """The cache of one undisturbed process."""
    cache = tmp_path_factory.mktemp("cache") / "whole"
    run_ok(*arguments(target_dir, data, cache, **SMALL))
    return cache


def assert_every_record_is_true(cache: Path, whole: Path) -> None:
    """What a killed process calls finished is finished."""
    for name in finished_shards(cache):
        json.loads((cache / "progress" / name).read_text())
        shard = f"shards/{name[:5]}.safetensors"
        assert (cache / shard).read_bytes() == (whole / shard).read_bytes(), shard


# SIGKILL


def test_killed_at_ten_random_moments_it_continues_to_the_same_bytes(tmp_path, target_dir, data, whole):
    cache, chance = tmp_path / "cache", random.Random(0)
    command = arguments(target_dir, data, cache, **SMALL)
    number = len(read_manifest(whole).plan)
    killed = 0
    for attempt in range(10):
        before = len(finished_shards(cache))
        enough = min(before + chance.randrange(4), number - 10 + attempt)
        dspark = Dspark(tmp_path / str(attempt), *command)
        assert dspark.wait_until(lambda enough=enough: len(finished_shards(cache)) >= enough), dspark.err
        time.sleep(chance.uniform(0, 0.02))
        dspark.send(signal.SIGKILL)
        killed += dspark.wait() == -signal.SIGKILL
        assert_every_record_is_true(cache, whole)
        assert len(finished_shards(cache)) >= before
        if killed and (cache / "manifest.json").exists():
            assert read_manifest(cache).status == "incomplete"
    assert killed == 10
    assert ": complete" in run_ok(*command), leftovers(cache)
    assert tree(cache) == tree(whole)


def test_killed_at_any_step_of_finishing_it_finishes_the_next_time(tmp_path, target_dir, few, monkeypatch):
    """Before every single change to the disk that is made once all shards are there."""
    options = {"shard_tokens": 100_000}
    run_ok(*arguments(target_dir, few, tmp_path / "whole", **options))
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.cache.writer.CacheWriter.finalise", lambda *_: None)
        run_ok(*arguments(target_dir, few, tmp_path / "all but finished", **options))
    step, code = 0, -signal.SIGKILL
    while code != 0:
        step += 1
        cache = tmp_path / f"cache{step}"
        shutil.copytree(tmp_path / "all but finished", cache)
        command = arguments(target_dir, few, cache, **options)
        code = Dspark(tmp_path / f"out{step}", *command, before=die_at, DIE_AT=str(step)).wait()
        assert code in (0, -signal.SIGKILL)
        run_ok(*command)
        assert tree(cache) == tree(tmp_path / "whole")
    assert step > 5


@pytest.mark.parametrize("step", [2, 3, 6, 9, 14, 19])
def test_killed_at_any_step_of_beginning_it_begins_the_next_time(tmp_path, target_dir, data, whole, step):
    command = arguments(target_dir, data, tmp_path / "cache", **SMALL)
    dspark = Dspark(tmp_path / "out", *command, before=die_at, DIE_AT=str(step))
    assert dspark.wait() == -signal.SIGKILL
    run_ok(*command)
    assert tree(tmp_path / "cache") == tree(whole)


# SIGINT and SIGTERM


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_stops_tidily_and_continues(tmp_path, target_dir, data, whole, number):
    cache = tmp_path / "cache"
    command = arguments(target_dir, data, cache, **SMALL)
    dspark = Dspark(tmp_path / "out", *command)
    assert dspark.wait_until(lambda: len(finished_shards(cache)) >= 2), dspark.err
    dspark.send(number)
    assert dspark.wait() == 128 + number
    assert dspark.errors == [
        f"error: stopped by {number.name}: {cache} keeps every finished shard, the same command continues"
    ]
    assert leftovers(cache) == []
    kept = finished_shards(cache)
    assert 2 <= len(kept) < len(read_manifest(whole).plan)
    assert_every_record_is_true(cache, whole)
    shards = {f"{name[:5]}.safetensors" for name in kept}
    assert {path.name for path in (cache / "shards").iterdir()} == shards, "no shard without its record"
    stamps = {name: (cache / "shards" / name).stat().st_mtime_ns for name in shards}
    run_ok(*command)
    assert {name: (cache / "shards" / name).stat().st_mtime_ns for name in shards} == stamps
    assert tree(cache) == tree(whole)


def test_asked_twice_it_stops_at_once_without_a_traceback(tmp_path, target_dir, data, whole):
    cache = tmp_path / "cache"
    command = arguments(target_dir, data, cache, **SMALL)
    dspark = Dspark(tmp_path / "out", *command)
    assert dspark.wait_until(lambda: len(finished_shards(cache)) >= 2), dspark.err
    dspark.send(signal.SIGINT)
    dspark.send(signal.SIGINT)
    assert dspark.wait() == 130
    assert "Traceback" not in dspark.err
    run_ok(*command)
    assert tree(cache) == tree(whole)


def test_interrupted_before_it_captures_it_says_so_in_one_line(tmp_path, target_dir, data):
    dspark = Dspark(tmp_path / "out", *arguments(target_dir, data, tmp_path / "cache", **SMALL))
    assert dspark.wait_until(lambda: dspark.err), "it says which data it reads, then loads the target"
    dspark.send(signal.SIGINT)
    assert dspark.wait() in (130, 0)
    assert "Traceback" not in dspark.err


def test_signals_mean_what_they_did_before_once_a_capture_is_over(tmp_path, target_dir, data_file):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    run_ok(*arguments(target_dir, data_file, tmp_path / "cache"))
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


# A disk that is full, and other trouble with it


def test_a_full_disk_is_one_line_and_the_same_command_continues(tmp_path, target_dir, data_file, cache_dir):
    """The system itself says no: every shard is larger than a file may be."""
    cache = tmp_path / "cache"
    command = arguments(target_dir, data_file, cache)
    dspark = Dspark(tmp_path / "out", *command, before=small_files_only)
    assert dspark.wait() == 1
    (line,) = dspark.errors
    assert f"{cache}/shards/0000" in line
    assert "File too large" in line
    assert leftovers(cache) == []
    assert finished_shards(cache) == []
    assert list((cache / "shards").iterdir()) == []
    run_ok(*command)
    assert tree(cache) == tree(cache_dir)


def refuse_writes(
    monkeypatch: pytest.MonkeyPatch, name: str, code: int, wanted: Callable[[Any], bool], after: int
) -> None:
    """Let `os.<name>` fail with `code` where `wanted(its argument)`, but for the first `after` times."""
    real, left, lock = getattr(os, name), [after], threading.Lock()

    def fail(what: Any, *rest: Any) -> Any:
        if wanted(what):
            with lock:
                left[0] -= 1
            if left[0] < 0:
                raise OSError(code, os.strerror(code))
        return real(what, *rest)

    monkeypatch.setattr(os, name, fail)


def in_a_writing_thread(_what: Any) -> bool:
    return threading.current_thread().name.startswith("shard")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EDQUOT], ids=os.strerror)
@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_write_that_fails_in_a_thread_is_one_line_naming_file_and_reason(
    tmp_path, target_dir, data_file, cache_dir, monkeypatch, code, name
):
    cache = tmp_path / "cache"
    command = arguments(target_dir, data_file, cache)
    with monkeypatch.context() as patch:
        refuse_writes(patch, name, code, in_a_writing_thread, after=5)
        result = run_cli(*command)
    assert_refused(result, 1, str(cache), os.strerror(code), "same command")
    assert leftovers(cache) == []
    assert_every_record_is_true(cache, cache_dir)
    assert 1 <= len(finished_shards(cache)) < len(read_manifest(cache_dir).plan)
    with pytest.raises(CacheError, match="incomplete"):
        CacheReader(cache)
    run_ok(*command)
    assert tree(cache) == tree(cache_dir)


@pytest.mark.parametrize("file", ["shards/{}.safetensors", "progress/{}.json"])
def test_the_very_last_write_that_fails_is_noticed_too(
    tmp_path, target_dir, data_file, cache_dir, monkeypatch, file
):
    """The loop has ended by then."""
    cache = tmp_path / "cache"
    command = arguments(target_dir, data_file, cache)
    name = file.format(f"{len(read_manifest(cache_dir).plan) - 1:05d}")
    with monkeypatch.context() as patch:
        wanted = Path(name).name
        refuse_writes(patch, "replace", errno.ENOSPC, lambda path: f".{wanted}~" in str(path), after=0)
        result = run_cli(*command)
    assert_refused(result, 1, str(cache / name), os.strerror(errno.ENOSPC))
    assert leftovers(cache) == []
    run_ok(*command)
    assert tree(cache) == tree(cache_dir)


def no_links(*_paths: object) -> None:
    raise OSError(errno.EPERM, os.strerror(errno.EPERM))


@pytest.mark.parametrize(
    "name", ["manifest.json", "samples.arrow", "target/frozen.safetensors", "target/config.json"]
)
def test_any_file_that_cannot_be_written_is_named(
    tmp_path, target_dir, data_file, cache_dir, monkeypatch, name
):
    cache = tmp_path / "cache"
    command = arguments(target_dir, data_file, cache)
    with monkeypatch.context() as patch:
        wanted = Path(name).name
        refuse_writes(patch, "replace", errno.ENOSPC, lambda path: f".{wanted}~" in str(path), after=0)
        patch.setattr(os, "link", no_links)  # how the first manifest gets its name
        result = run_cli(*command)
    assert_refused(result, 1, str(cache / name), os.strerror(errno.ENOSPC))
    assert not (cache / name).exists()
    assert leftovers(cache) == []
    run_ok(*command)
    assert tree(cache) == tree(cache_dir)


def test_a_complete_manifest_that_cannot_be_written_costs_nothing_else(
    tmp_path, target_dir, data_file, cache_dir, monkeypatch
):
    cache = tmp_path / "cache"
    command = arguments(target_dir, data_file, cache)
    with monkeypatch.context() as patch:
        refuse_writes(patch, "replace", errno.ENOSPC, lambda path: ".manifest.json~" in str(path), after=0)
        assert_refused(run_cli(*command), 1, str(cache / "manifest.json"), "No space left")
    assert read_manifest(cache).status == "incomplete"
    assert len(finished_shards(cache)) == len(read_manifest(cache_dir).plan)
    monkeypatch.setattr("capture.shards.fill.ShardFiller.fill", None)  # no target is needed any more
    run_ok(*command)
    assert tree(cache) == tree(cache_dir)


def test_a_folder_without_permission_is_named(tmp_path, target_dir, data_file, cache_dir):
    (tmp_path / "closed").mkdir(mode=0o500)
    cache = tmp_path / "closed" / "cache"
    with machine.obeying_permissions():
        result = run_cli(*arguments(target_dir, data_file, cache))
    assert_refused(result, 1, str(cache), "Permission denied")
    (tmp_path / "closed").chmod(0o700)
    run_ok(*arguments(target_dir, data_file, cache))
    assert tree(cache) == tree(cache_dir)


def test_permission_lost_on_the_way_is_named(tmp_path, target_dir, data_file, cache_dir, monkeypatch):
    cache, real, left = tmp_path / "cache", Path.open, [3]

    def denied(self: Path, *given: Any, **options: Any) -> Any:
        if self.name.endswith(".partial") and self.parent.name == "shards":
            left[0] -= 1
            if left[0] < 0:
                raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return real(self, *given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", denied)
        result = run_cli(*arguments(target_dir, data_file, cache))
    assert_refused(result, 1, f"{cache}/shards/0000", "Permission denied")
    assert leftovers(cache) == []
    assert len(finished_shards(cache)) == 3
    run_ok(*arguments(target_dir, data_file, cache))
    assert tree(cache) == tree(cache_dir)
