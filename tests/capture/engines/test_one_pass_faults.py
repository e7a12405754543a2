"""One-pass captures that are interrupted, damaged, or shared by two processes."""

from __future__ import annotations

import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from capture import run
from pipeline.cache import CacheReader, CacheWriter, read_manifest
from pipeline.cache.manifest import write_manifest
from tests.capture.conftest import arguments, tree
from tests.conftest import assert_refused, run_cli, run_ok
from tests.processes import Dspark, finished_shards

EXACT = {"context_codec": "fp32", "last_codec": "fp32", "layers": "0,3"}


@pytest.fixture(scope="module")
def words(engine_python, fp32_target, few):
    """The words of a one-pass capture."""

    def made(cache: Path, *more: str, **options: Any) -> list[str | Path]:
        usual = {"engine": "vllm", "engine_python": engine_python, "max_new_tokens": 4, **EXACT}
        return [*arguments(fp32_target, few, cache, **{**usual, **options}), "--regenerate", *more]

    return made


@pytest.fixture(scope="module")
def calm(tmp_path_factory, words) -> Path:
    """A cache that nothing disturbed."""
    folder = tmp_path_factory.mktemp("calm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIDS", str(folder / "pids"))
        run_ok(*words(folder / "cache"))
    return folder / "cache"


@pytest.fixture
def copied(calm, tmp_path) -> Path:
    return shutil.copytree(calm, tmp_path / "cache")


class Killed(BaseException):
    """A kill at a moment that a test chooses."""


def test_an_interrupted_cache_is_not_damaged(tmp_path, words, calm):
    cache = tmp_path / "cache"
    process = Dspark(tmp_path / "process", *words(cache))
    assert process.wait_until(lambda: finished_shards(cache))
    process.send(signal.SIGKILL)
    process.wait()
    shards = finished_shards(cache)
    assert "incomplete" in run_ok("verify", "--repair", cache)
    assert finished_shards(cache) == shards
    assert "at most" in run_ok("inspect", cache)
    path = cache / "shards" / "00000.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert_refused(run_cli("verify", cache), 1, "damaged or missing")
    path.write_bytes(whole)
    run_ok(*words(cache))
    assert tree(cache) == tree(calm)


@pytest.mark.parametrize("moment", ["settled", "published"])
def test_killed_at_the_end_it_goes_on(tmp_path, words, calm, monkeypatch, moment):
    """Between the index of the answers and the last manifest, and between that and the end."""
    cache = tmp_path / "cache"

    def kill(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        if moment == "settled":
            patch.setattr(CacheWriter, "finalise", kill)
        else:
            patch.setattr("pipeline.cache.progress.records.Records.remove", kill)
        with pytest.raises(Killed):
            run_cli(*words(cache))
    assert (cache / "progress").is_dir()
    assert "damaged" not in run_cli("verify", cache).output
    run_ok("inspect", cache)
    run_ok(*words(cache))
    assert tree(cache) == tree(calm)


def test_a_process_that_joins_late_keeps_the_index_of_the_answers(tmp_path, words, calm, monkeypatch):
    """Between another one's last look at the answers, and its last manifest."""
    cache, real = tmp_path / "cache", CacheWriter.finalise

    def joined(writer: CacheWriter, *args: Any) -> object:
        prepared = seen[0]
        rows = dict(prepared.data.rows)
        CacheWriter(cache, prepared.full_identity(), prepared.plan, prepared.index, rows)
        return real(writer, *args)

    seen: list[Any] = []
    prepare = run.prepare
    monkeypatch.setattr(run, "prepare", lambda options: seen.append(prepare(options)) or seen[0])
    monkeypatch.setattr(CacheWriter, "finalise", joined)
    run_ok(*words(cache))
    assert tree(cache) == tree(calm)


def test_a_process_that_is_late_starts_no_engine_again(tmp_path, words, calm, monkeypatch):
    """Another process completes the cache just before this one looks at the answers."""
    cache, real, starts = tmp_path / "cache", run.settle, tmp_path / "starts"
    monkeypatch.setenv("COUNT", str(starts))

    def late(writer: CacheWriter, prepared: Any) -> list[int]:
        if writer.progress.is_dir():
            shutil.copytree(calm, cache, dirs_exist_ok=True)
            shutil.rmtree(cache / "progress")
        return real(writer, prepared)

    monkeypatch.setattr(run, "settle", late)
    run_ok(*words(cache))
    assert tree(cache) == tree(calm)
    assert starts.read_text() == "."


def test_two_processes_share_one_pass(tmp_path, words, calm):
    cache = tmp_path / "cache"
    both = [Dspark(tmp_path / str(i), *words(cache), "--worker", f"{i}/2") for i in range(2)]
    assert [process.wait() for process in both] == [0, 0], [process.err for process in both]
    if read_manifest(cache).status != "complete":
        run_ok(*words(cache))
    assert tree(cache) == tree(calm)


@pytest.mark.parametrize("name", ["shards/00001.safetensors", "samples.arrow"])
def test_lost_answers_are_said_to_be_lost(words, copied, name):
    run_cli("verify", "--repair", copied)
    (copied / name).unlink()
    for _ in range(2):
        assert_refused(run_cli(*words(copied)), 1, name, "answers", f"remove {copied}")


def test_a_lost_file_of_the_target_is_written_again(words, copied, calm):
    (copied / "target" / "frozen.safetensors").unlink()
    run_ok(*words(copied))
    assert tree(copied) == tree(calm)
    assert len(CacheReader(copied))


def test_a_complete_cache_of_another_target_is_not_reused(words, copied):
    found = read_manifest(copied)
    target = replace(found.identity.target, weights="0" * 64)
    write_manifest(copied, replace(found, identity=replace(found.identity, target=target)))
    assert_refused(run_cli(*words(copied)), 1, "target.weights")
