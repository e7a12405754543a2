"""One-pass captures that are interrupted, damaged, or shared by two processes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from capture import run
from capture.data.conversations import TokenizedSample
from capture.engines import stream
from capture.one_pass import journal
from capture.one_pass.engine import OnePassEngine
from capture.one_pass.journal import Journal
from capture.one_pass.turns import Conversation, Turn
from pipeline.cache import CacheReader, CacheWriter, fidelity, read_manifest
from pipeline.cache.manifest import write_manifest
from tests.capture.conftest import arguments, tree
from tests.conftest import assert_refused, run_cli, run_ok
from tests.processes import Dspark, finished_shards
from tests.tiny import make_conversations


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


def sample(ids: list[int], mask: list[int]) -> TokenizedSample:
    return TokenizedSample(0, np.array(ids, np.int32), np.array(mask, np.uint8))


def conversation(ids: tuple[int, ...] = (5, 6, 7, 8, 9, 10, 11)) -> Conversation:
    """Two turns, each of at most four tokens."""
    return Conversation(sample(list(ids), [0, 0, 1, 1, 0, 1, 1]), 100, 4)


def test_answers_to_another_answer_are_passed_over(tmp_path):
    """Two owners of a shard, whose engines answer differently, write by turns."""
    path, one, two = tmp_path / "answers.jsonl", conversation(), conversation()
    for owner, tokens in ((one, (20, 2)), (two, (30, 2)), (two, (31, 2)), (one, (21, 2))):
        turn = Turn(tokens, finished=True)
        Journal(path).add(0, owner, turn)
        owner.answers.append(turn)
    found = conversation()
    Journal(path).read([found])
    assert found.answers == one.answers


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": [20, 2**40]},
        {"tokens": [-1, 2]},
        {"tokens": [20, 21, 22, 23, 24]},
        {"tokens": []},
        {"tokens": "22"},
        {"tokens": None},
        {"sample": -2, "tokens": [21, 2]},
        {"sample": 7},
        {"sample": "0"},
        {"turn": 1, "tokens": [21, 2]},
        {"turn": 5, "tokens": [21, 2]},
    ],
)
def test_a_line_that_no_capture_writes_is_passed_over(tmp_path, change):
    path = tmp_path / "answers.jsonl"
    Journal(path).add(0, conversation(), Turn((20, 2), finished=True))
    record = json.loads(path.read_text())
    lines = [json.dumps(record | change), "", "[]", "3", "null", "\xff", json.dumps(record)]
    path.write_bytes("".join(f"{line}\n" for line in lines).encode("latin-1"))
    found, other = conversation(), conversation()
    Journal(path).read([found, other])
    assert (found.answers, other.answers) == ([Turn((20, 2), finished=True)], [])


def test_more_answers_than_turns_are_passed_over(tmp_path):
    path, asked = tmp_path / "answers.jsonl", conversation()
    for _ in range(3):
        turn = Turn((20, 2), finished=True)
        Journal(path).add(0, asked, turn)
        asked.answers = [*asked.answers, turn][:2]
    found = conversation()
    Journal(path).read([found])
    assert len(found.answers) == 2


def test_a_full_disk_is_said_so(tmp_path, words, monkeypatch):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(journal, "os", SimpleNamespace(fsync=full))
    result = run_cli(*words(tmp_path / "cache"))
    assert_refused(result, 1, "answers-00000.jsonl can't be written", "No space left on device")


def test_rows_without_a_prompt_are_refused(tmp_path, engine_python, fp32_target):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"text": "the cat sat on the mat"}) + "\n")
    asked = arguments(fp32_target, data, tmp_path / "cache", engine="vllm", engine_python=engine_python)
    assert_refused(run_cli(*asked, "--regenerate"), 1, "row 1 of the data", "no prompt", "--regenerate")


def test_states_that_are_kept_leave_the_folder_in_memory(tmp_path, words, monkeypatch):
    maps, seen, states = Path("/proc/self/maps"), [], OnePassEngine.states
    if not maps.exists():
        pytest.skip("this system has no /proc")

    def look(engine: OnePassEngine, batch: Any) -> object:
        seen.append("dspark-states" in maps.read_text())
        return states(engine, batch)

    monkeypatch.setattr(OnePassEngine, "states", look)
    run_ok(*words(tmp_path / "cache"))
    assert seen
    assert not any(seen)


def test_an_unread_token_has_no_share_in_the_figures(tmp_path, words, monkeypatch):
    """Its states are zeros: a relative error would be infinite."""
    monkeypatch.setattr(fidelity, "CHECKED_ROWS", 10**6)  # every row
    cache = tmp_path / "cache"
    run_ok(*words(cache, context_codec="nf4", last_codec="int8", hidden="all-tokens"))
    run_ok("convert", cache, tmp_path / "other", "--context-codec", "lm3")
    for found in (cache, tmp_path / "other"):
        figures = read_manifest(found).fidelity
        assert figures["relative_error.context.0_p99"] < 1, figures
        assert figures["relative_error.last_hidden_p99"] < 1, figures


def test_a_shard_that_is_only_read_again_is_compared_with_the_engine(tmp_path, words, monkeypatch):
    """All of its answers are on disk, and the engine is not the same."""
    asked = words(tmp_path / "cache", shard_tokens=10**6)

    def kill(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(CacheWriter, "new_shard", kill)
        with pytest.raises(Killed):
            run_cli(*asked)
    real = stream.Stream.take

    def another(self: stream.Stream) -> stream.Answer:
        answer = real(self)
        if answer.logprobs is not None:
            answer.logprobs -= 1
        return answer

    monkeypatch.setattr(run, "prove_target", lambda *_: {})
    monkeypatch.setattr(stream.Stream, "take", another)
    assert_refused(run_cli(*asked), 1, "are not vLLM's own")


def test_a_file_of_other_answers_is_refused(tmp_path, fp32_target):
    data = make_conversations(tmp_path / "data.jsonl", count=4, seed=3)
    cache, options = tmp_path / "cache", {"max_new_tokens": 4}
    asked = arguments(fp32_target, data, cache, temperature=0, **options)
    assert run_cli(*asked, "--regenerate").exit_code == 0
    other = arguments(fp32_target, data, cache, temperature=1.0, **options)
    assert_refused(run_cli(*other, "--regenerate"), 2, "made otherwise", "answers differ", "--cache")
    shutil.rmtree(cache)
    assert_refused(run_cli(*other, "--regenerate"), 2, "made otherwise")
    assert run_cli(*asked, "--regenerate").exit_code == 0
