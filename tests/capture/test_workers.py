"""Any number of processes fill one cache, at once or one after the other, with the same bytes in the end."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

import capture.run
from capture.workers import worker_place
from pipeline.cache import CacheReader, read_manifest
from pipeline.cache.progress.claims import Worker
from pipeline.errors import UsageError
from pipeline.process import WorkerPlace
from tests.capture.conftest import arguments, tree
from tests.conftest import run_cli, run_ok
from tests.processes import Dspark, count_tokenised_rows, finished_shards, leftovers
from tests.tiny import make_conversations

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
SMALL = {"shard_tokens": 64, "batch_tokens": 64}


@pytest.fixture(autouse=True)
def not_under_torchrun(monkeypatch):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_conversations(tmp_path_factory.mktemp("data") / "chats.jsonl", count=60, seed=2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, target_dir, data) -> dict[str, bytes]:
    """The cache of one undisturbed process."""
    cache = tmp_path_factory.mktemp("cache") / "whole"
    run_ok(*arguments(target_dir, data, cache, **SMALL))
    assert len(read_manifest(cache).plan) > 30
    return tree(cache)


class Team:
    """N workers on one cache."""

    def __init__(self, folder: Path, target: Path, data: Path, count: int):
        self.cache = folder / "cache"
        command = arguments(target, data, self.cache, **SMALL)
        name = f"{len(list(folder.iterdir()))}"
        self.members = [
            Dspark(folder / f"{name}-{rank}", *command, "--worker", f"{rank}/{count}")
            for rank in range(count)
        ]

    def finish(self) -> None:
        assert [member.wait() for member in self.members] == [0] * len(self.members), [
            member.err for member in self.members
        ]

    def stop(self, number: signal.Signals) -> list[int]:
        """Stop all once two shards are finished."""
        for member in self.members:
            assert member.wait_until(lambda: len(finished_shards(self.cache)) >= 2), member.err
        for member in self.members:
            member.send(number)
        return [member.wait() for member in self.members]


# Which process is this


@pytest.mark.parametrize(
    "text", ["", "1", "/", "2/2", "4/2", "0/0", "-1/2", "a/b", "1/", "/2", "0.5/2", "1/2/3", "0 of 2"]
)
def test_a_place_that_makes_no_sense_is_refused(text):
    with pytest.raises(UsageError, match=r"--worker I/N with I from 0 to N-1.*got"):
        worker_place(text)


def test_a_place_is_given_by_the_option_then_by_torchrun(monkeypatch):
    assert worker_place(None) == WorkerPlace(0, 1, 0)
    assert worker_place(None).label == ""
    for name, value in zip(TORCHRUN, ("5", "8", "1"), strict=True):
        monkeypatch.setenv(name, value)
    assert worker_place(None) == WorkerPlace(5, 8, 1)
    assert worker_place(None).label == "5/8"
    assert worker_place("1/4") == WorkerPlace(1, 4, 1)
    monkeypatch.delenv("LOCAL_RANK")
    assert worker_place(None) == WorkerPlace(5, 8, 5)
    monkeypatch.setenv("RANK", "five")
    assert worker_place(None) == WorkerPlace(0, 1, 0)


def test_each_process_of_a_machine_gets_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [WorkerPlace(rank, 8, rank % 4).device("auto") for rank in (0, 3, 6)] == [
        "cuda:0",
        "cuda:3",
        "cuda:2",
    ]
    assert WorkerPlace(0, 1, 0).device("auto") == "auto", "one process alone: the library's own choice"
    assert WorkerPlace(3, 4, 3).device("cuda:1") == "cuda:1", "asked for by name"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert WorkerPlace(3, 4, 3).device("auto") == "auto"


# Together


@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_workers_at_once_gives_the_same_files(tmp_path, target_dir, data, whole, count):
    team = Team(tmp_path, target_dir, data, count)
    team.finish()
    assert tree(team.cache) == whole
    said = [member.out for member in team.members]
    assert any(": complete" in out for out in said)
    for out in said[1:]:
        assert "codec" not in out, "the plan is said once"


def test_two_processes_under_torchrun_give_the_same_files(tmp_path, target_dir, data, whole):
    cache = tmp_path / "cache"
    both = [
        Dspark(
            tmp_path / f"rank{rank}",
            *arguments(target_dir, data, cache, **SMALL),
            RANK=str(rank),
            WORLD_SIZE="2",
            LOCAL_RANK=str(rank),
        )
        for rank in range(2)
    ]
    assert [each.wait() for each in both] == [0, 0], [each.err for each in both]
    assert tree(cache) == whole
    assert "capture 1/2" in both[1].err


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1)])
def test_what_some_began_others_finish(tmp_path, target_dir, data, whole, before, after):
    team = Team(tmp_path, target_dir, data, before)
    codes = team.stop(signal.SIGTERM)
    assert set(codes) <= {128 + signal.SIGTERM, -signal.SIGTERM}, "it had not begun, or stopped tidily"
    assert 128 + signal.SIGTERM in codes
    assert leftovers(team.cache) == []
    kept = {name: (team.cache / "progress" / name).stat().st_mtime_ns for name in finished_shards(team.cache)}
    shards = {name: team.cache / "shards" / f"{name[:5]}.safetensors" for name in kept}
    stamps = {name: path.stat().st_mtime_ns for name, path in shards.items()}
    Team(tmp_path, target_dir, data, after).finish()
    assert {name: path.stat().st_mtime_ns for name, path in shards.items()} == stamps
    assert tree(team.cache) == whole


def test_one_of_two_is_killed_and_three_finish(tmp_path, target_dir, data, whole):
    first = Dspark(
        tmp_path / "first", *arguments(target_dir, data, tmp_path / "cache", **SMALL), "--worker", "0/2"
    )
    assert first.wait_until(lambda: len(finished_shards(tmp_path / "cache")) >= 3), first.err
    first.send(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    assert read_manifest(tmp_path / "cache").status == "incomplete"
    assert any("worker-" in name for name in leftovers(tmp_path / "cache"))
    Team(tmp_path, target_dir, data, 3).finish()
    assert tree(tmp_path / "cache") == whole


def test_one_of_three_is_killed_and_the_others_go_on(tmp_path, target_dir, data, whole):
    """The shard that it held is free again as soon as it is dead; the same command finishes it."""
    team = Team(tmp_path, target_dir, data, 3)
    assert team.members[1].wait_until(lambda: len(finished_shards(team.cache)) >= 3)
    team.members[1].send(signal.SIGKILL)
    assert [team.members[i].wait() for i in (0, 2)] == [0, 0]
    team.members[1].wait()
    run_ok(*arguments(target_dir, data, team.cache, **SMALL))
    assert tree(team.cache) == whole
    CacheReader(team.cache).check_shards()


# One after the other


def begin(monkeypatch: pytest.MonkeyPatch, shards: int, *command: str | Path) -> None:
    """Capture only so many shards."""
    real = capture.run.take_shards
    with monkeypatch.context() as patch:
        patch.setattr(capture.run, "take_shards", lambda *given: itertools.islice(real(*given), shards))
        said = run_ok(*command)
    assert f"shards written by this process: {shards}; others are at work on the rest" in said


def test_a_worker_that_finds_nothing_left_says_so_and_succeeds(
    tmp_path, target_dir, data, whole, monkeypatch
):
    cache = tmp_path / "cache"
    command = arguments(target_dir, data, cache, **SMALL)
    begin(monkeypatch, 4, *command)
    assert len(finished_shards(cache)) == 4
    with Worker(cache / "progress", "0/2") as other:
        for shard in range(len(read_manifest(cache).plan)):
            assert other.claim(f"{shard:05d}")
        result = run_cli(*command, "--worker", "1/2")
        assert result.exit_code == 0, result.output
        assert result.stdout.splitlines() == [
            f"cache {cache}: shards written by this process: 0; others are at work on the rest"
        ]
        assert "error" not in result.stderr
    run_ok(*command, "--worker", "1/2")
    assert tree(cache) == whole
    assert "reused" in run_ok(*command, "--worker", "0/2")


def test_a_shard_that_a_living_worker_holds_is_left_to_it(tmp_path, target_dir, data, whole, monkeypatch):
    cache = tmp_path / "cache"
    command = arguments(target_dir, data, cache, **SMALL)
    begin(monkeypatch, 1, *command)
    with Worker(cache / "progress", "0/2") as other:
        assert other.claim("00007")
        assert "others are at work" in run_ok(*command)
        number = len(read_manifest(cache).plan)
        assert finished_shards(cache) == [f"{n:05d}.json" for n in range(number) if n != 7]
    assert ": complete" in run_ok(*command)
    assert tree(cache) == whole


def test_workers_that_start_together_tokenise_once(tmp_path, target_dir, data, whole):
    counted = tmp_path / "counted"
    variables = {"DSPARK_TOKENS": str(tmp_path / "tokens"), "TOKENISED": str(counted)}
    team = [
        Dspark(
            tmp_path / str(rank),
            *arguments(target_dir, data, tmp_path / "cache", **SMALL),
            "--worker",
            f"{rank}/3",
            before=count_tokenised_rows,
            **variables,
        )
        for rank in range(3)
    ]
    assert [member.wait() for member in team] == [0, 0, 0], [member.err for member in team]
    assert len(counted.read_bytes()) == len(data.read_text().splitlines())
    assert [path.suffix for path in (tmp_path / "tokens").iterdir()] == [".arrow"]
    assert tree(tmp_path / "cache") == whole


@pytest.mark.parametrize("moment", ["prove_target", "_write_target", "ShardFiller"])
def test_a_worker_whom_others_overtake_before_its_first_shard_succeeds(
    tmp_path, target_dir, data, whole, monkeypatch, moment
):
    """The others finish the cache, and its progress/ is gone, while this one still loads the target."""
    cache = tmp_path / "cache"
    command = arguments(target_dir, data, cache, **SMALL)
    real = getattr(capture.run, moment)

    def overtaken(*given, **options):
        if moment != "_write_target":
            assert Dspark(tmp_path / "other", *command).wait() == 0
            return real(*given, **options)
        result = real(*given, **options)  # it holds the claim: others can finish only afterwards
        assert Dspark(tmp_path / "other", *command).wait() == 0
        return result

    monkeypatch.setattr(capture.run, moment, overtaken)
    result = run_cli(*command, "--worker", "1/2")
    assert result.exit_code == 0, result.output
    assert "error" not in result.stderr
    assert ": complete" in result.stdout
    assert tree(cache) == whole


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only Linux says that a process is dead")
def test_a_killed_worker_whose_parent_never_asked_is_dead(tmp_path, target_dir, data, whole):
    """As in a container whose first process reaps nobody."""
    cache = tmp_path / "cache"
    command = arguments(target_dir, data, cache, **SMALL)
    child = os.fork()
    if not child:  # nothing here but what ends in exec
        with (tmp_path / "log").open("wb") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        one = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}  # other sums, other bytes
        os.execve(sys.executable, [sys.executable, "-m", "pipeline", *map(str, command)], one)
    try:
        deadline = time.monotonic() + 100
        while len(finished_shards(cache)) < 2:
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
        while "Z" not in Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[:1]:
            time.sleep(0.005)
        assert ": complete" in run_ok(*command)
    finally:
        os.waitpid(child, 0)
    assert tree(cache) == whole


def die_over_a_claim() -> None:
    """Be killed where the fourth claim of this process gets its name."""
    real, left = os.link, [4]

    def link(source, path):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(source, path)

    os.link = link


def test_a_worker_killed_while_it_claims_leaves_no_claim_without_a_name(tmp_path, target_dir, data, whole):
    cache = tmp_path / "cache"
    command = arguments(target_dir, data, cache, **SMALL)
    assert Dspark(tmp_path / "out", *command, before=die_over_a_claim).wait() == -signal.SIGKILL
    assert all(path.read_text() for path in cache.glob("progress/*.claim"))
    assert ": complete" in run_ok(*command)
    assert tree(cache) == whole
