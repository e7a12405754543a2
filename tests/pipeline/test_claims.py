"""One owner a shard: races, the dead, the living, and folders full of nonsense."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from pipeline import process
from pipeline.cache.progress import claims
from pipeline.cache.progress.claims import DEAD_AFTER_SECONDS, Worker, live_workers
from pipeline.errors import WriteError

ROOT = Path(__file__).parents[2]
NAMES = [f"{i:05d}" for i in range(40)]

# Says that it is ready, claims what a line of its input names, says which it got, and works until it is
# killed or its input ends.
OWNER = """
import sys
from pathlib import Path
from pipeline.cache.progress.claims import Worker
with Worker(Path(sys.argv[1])) as worker:
    print("ready", flush=True)
    print(*[name for name in sys.stdin.readline().split() if worker.claim(name)], flush=True)
    sys.stdin.read()
"""


def start_owner(folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", OWNER, str(folder)]
    return subprocess.Popen(
        command, cwd=ROOT, text=True, bufsize=1, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


@pytest.fixture
def owner(tmp_path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Processes that hold what they are told to, by the time they are handed out."""
    with ExitStack() as stack:

        def start(*names: str) -> subprocess.Popen:
            child = stack.enter_context(start_owner(tmp_path))
            stack.callback(child.kill)
            assert child.stdout.readline() == "ready\n"
            print(*names, file=child.stdin)
            assert child.stdout.readline().split() == list(names)
            return child

        yield start


def kill(child: subprocess.Popen) -> None:
    child.send_signal(signal.SIGKILL)
    child.wait()


def leave_behind(
    folder: Path, *names: str, age: float = 0.0, place: str = "feedfacecafe", **values: object
) -> str:
    """What a worker leaves who dies: its file, last touched `age` seconds ago, and its claims."""
    owner = f"{place}-4242-{time.time_ns():x}"
    state = {"label": "", "host": "elsewhere", "place": place, "pid": 4242, "started": "17", **values}
    file = folder / f"worker-{owner}.json"
    file.write_text(json.dumps(state))
    for name in names:
        (folder / f"{name}.claim").write_text(owner)
    touch(file, age)
    return owner


def touch(path: Path, age: float) -> None:
    then = time.time() - age
    os.utime(path, (then, then))


# --- Races ---------------------------------------------------------------------------------------


def race(workers: list[Worker], names: list[str]) -> Counter:
    """All workers at once try for all names, each in its own order; how often was each claimed?"""
    claimed: list[str] = []
    barrier = threading.Barrier(len(workers))

    def run(worker: Worker, order: list[str]) -> None:
        barrier.wait()
        claimed.extend([name for name in order if worker.claim(name)])

    threads = []
    for i, worker in enumerate(workers):
        order = names if i % 2 else [*names[i:], *names[:i]]
        threads.append(threading.Thread(target=run, args=(worker, order)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Counter(claimed)


def test_threads_that_race_claim_each_name_once(tmp_path):
    with ExitStack() as stack:
        workers = [stack.enter_context(Worker(tmp_path)) for _ in range(6)]
        assert race(workers, NAMES) == Counter(NAMES)
        assert race(workers, NAMES) == Counter()  # they are all taken


def test_processes_that_race_claim_each_name_once(tmp_path):
    children = [start_owner(tmp_path) for _ in range(3)]
    assert [child.stdout.readline() for child in children] == ["ready\n"] * 3
    for i, child in enumerate(children):
        print(*NAMES[i:], *NAMES[:i], file=child.stdin)
    claimed = [name for child in children for name in child.stdout.readline().split()]
    for child in children:
        child.communicate(timeout=60)
    assert Counter(claimed) == Counter(NAMES)
    assert list(tmp_path.iterdir()) == []


def test_claims_of_the_dead_are_taken_over_once_whoever_races_for_them(tmp_path):
    """Again and again, and the heirs die too: every second name was left twice."""
    for _ in range(5):
        leave_behind(tmp_path, *NAMES, place=process.place())
        with ExitStack() as stack:
            workers = [stack.enter_context(Worker(tmp_path)) for _ in range(6)]
            for name in NAMES[::2]:
                assert workers[0].claim(name)
                workers[0]._claims[name].write_text(leave_behind(tmp_path, place=process.place()))
                del workers[0]._claims[name]
            assert race(workers, NAMES) == Counter(NAMES)


def test_a_claim_that_was_given_back_is_not_inherited(tmp_path, monkeypatch):
    """Between the look at a claim and the taking over, its owner gave it back and left: a third has it."""
    with Worker(tmp_path) as late, Worker(tmp_path) as third:
        leaving = leave_behind(tmp_path, "00000", place=process.place())
        real = Worker._at_work

        def leave_meanwhile(self: Worker, owner: str) -> bool:
            lives = real(self, owner)
            if owner == leaving:
                monkeypatch.undo()
                (tmp_path / "00000.claim").unlink()
                assert third.claim("00000")
            return lives

        monkeypatch.setattr(Worker, "_at_work", leave_meanwhile)
        assert not late.claim("00000")
        assert sorted(path.name for path in tmp_path.glob("*.claim")) == ["00000.claim"]


# --- The dead and the living ---------------------------------------------------------------------


def test_a_claim_of_a_killed_process_is_taken_over_at_once(tmp_path, owner):
    child = owner("00000", "00001")
    with Worker(tmp_path) as worker:
        assert not worker.claim("00000")
        kill(child)
        assert worker.claim("00000")
        assert worker.claim("00001")
        with Worker(tmp_path) as other:
            assert not other.claim("00000")


def test_a_claim_of_a_living_process_is_never_taken_over(tmp_path, owner):
    """Of this machine: whether it lives is asked of the system, so its heart may stop for any time."""
    child = owner("00000")
    for path in tmp_path.iterdir():
        touch(path, 100 * DEAD_AFTER_SECONDS)
    with Worker(tmp_path) as worker:
        assert not worker.claim("00000")
        child.send_signal(signal.SIGSTOP)
        assert not worker.claim("00000")
        child.send_signal(signal.SIGCONT)
        child.communicate(timeout=60)
        assert worker.claim("00000")


def test_an_heir_is_an_owner_like_any_other(tmp_path, owner):
    """It gives back what it took over, and if it is killed another takes over again."""
    leave_behind(tmp_path, "00000", place=process.place())
    child = owner("00000")
    with Worker(tmp_path) as worker:
        assert not worker.claim("00000")
        kill(child)
        assert worker.claim("00000")
        worker.release("00000")
        with Worker(tmp_path) as other:
            assert other.claim("00000")
            assert not worker.claim("00000")
        assert worker.claim("00000")


def test_a_process_of_another_machine_is_dead_only_when_its_heart_was_silent_for_long(tmp_path):
    leave_behind(tmp_path, "00000", age=DEAD_AFTER_SECONDS - 20)
    gone = leave_behind(tmp_path, "00001", age=DEAD_AFTER_SECONDS + 20)
    with Worker(tmp_path) as worker:
        assert not worker.claim("00000")
        assert worker.claim("00001")
        assert not (tmp_path / f"worker-{gone}.json").exists()


def test_a_silent_process_of_another_machine_is_noticed_while_at_work(tmp_path):
    there = leave_behind(tmp_path, "00000", "00001")
    with Worker(tmp_path) as worker:
        assert not worker.claim("00000")
        touch(tmp_path / f"worker-{there}.json", DEAD_AFTER_SECONDS + 20)
        assert worker.claim("00000")
        (tmp_path / f"worker-{there}.json").unlink()
        assert worker.claim("00001")


def test_nobody_is_waited_for_where_nobody_is_elsewhere(tmp_path, owner):
    owner("00000")

    def never(_processes: int) -> None:
        raise AssertionError("it waited")

    with Worker(tmp_path) as worker:
        assert not worker.others_died(never)


def test_a_sign_of_life_ends_the_waiting(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "HEARTBEAT_SECONDS", 0.01)
    there = leave_behind(tmp_path, "00000", age=30)
    asked = []

    def beat(processes: int) -> None:
        asked.append(processes)
        if len(asked) == 3:
            touch(tmp_path / f"worker-{there}.json", 0)

    with Worker(tmp_path) as worker:
        assert not worker.others_died(beat)
        assert not worker.claim("00000")
    assert asked == [1, 1, 1]


def test_who_shows_no_sign_of_life_for_long_is_dead_and_leaves_its_shards(tmp_path, monkeypatch):
    """As a container does that was killed and started again: another place, the same cache."""
    monkeypatch.setattr(claims, "HEARTBEAT_SECONDS", 0.01)
    monkeypatch.setattr(claims, "DEAD_AFTER_SECONDS", 30.0)
    leave_behind(tmp_path, "00000", age=29.5)
    asked = []
    with Worker(tmp_path) as worker:
        assert not worker.claim("00000")
        assert worker.others_died(asked.append)
        assert worker.claim("00000")
    assert set(asked) == {1}


def test_a_newcomer_with_a_wrong_clock_leaves_the_living_alone(tmp_path, monkeypatch):
    """Ages are told by the file system's clock, that of the newcomer's own file."""
    there = leave_behind(tmp_path, "00000", age=5)
    monkeypatch.setattr(claims.time, "time", lambda: 10 * DEAD_AFTER_SECONDS + 1e9)
    with Worker(tmp_path) as worker:
        assert (tmp_path / f"worker-{there}.json").exists()
        assert not worker.claim("00000")


def test_a_heartbeat_in_the_future_keeps_nothing_for_ever(tmp_path):
    """Clocks are set back: a dead process must not own its shard until they have caught up."""
    leave_behind(tmp_path, "00000", age=-100 * DEAD_AFTER_SECONDS)
    leave_behind(tmp_path, "00001", age=-5)
    with Worker(tmp_path) as worker:
        assert worker.claim("00000")
        assert not worker.claim("00001")


def test_a_process_id_that_came_back_is_another_process(tmp_path):
    """This very process has the id, and began at another time than the owner did."""
    begun = process.started(os.getpid())
    if begun is None:
        pytest.skip("this system does not tell when a process began")
    mine = {"place": process.place(), "pid": os.getpid()}
    leave_behind(tmp_path, "00000", **mine, started=begun)
    leave_behind(tmp_path, "00001", **mine, started=str(int(begun) - 1))
    leave_behind(tmp_path, "00002", **mine, started=None)  # not known: it may be
    with Worker(tmp_path) as worker:
        assert [name for name in NAMES[:3] if worker.claim(name)] == ["00001"]


def test_a_claim_without_a_name_is_being_written_until_it_is_old(tmp_path):
    (tmp_path / "00000.claim").touch()
    with Worker(tmp_path) as worker:
        assert not worker.claim("00000")
        touch(tmp_path / "00000.claim", DEAD_AFTER_SECONDS - 20)
        assert not worker.claim("00000")
        touch(tmp_path / "00000.claim", DEAD_AFTER_SECONDS + 20)
        assert worker.claim("00000")


# --- Giving back ---------------------------------------------------------------------------------


def test_what_is_given_back_can_be_claimed_again(tmp_path):
    with Worker(tmp_path) as one, Worker(tmp_path) as two:
        assert one.claim("00000")
        assert not one.claim("00000")  # not even by itself, as long as it holds it
        assert not two.claim("00000")
        two.release("00000")  # not its own to give
        assert not two.claim("00000")
        one.release("00000")
        assert two.claim("00000")
        one.release("00000")  # no longer its own
        assert not one.claim("00000")


@pytest.mark.parametrize("ending", [StopIteration, KeyboardInterrupt, WriteError])
def test_leaving_gives_everything_back(tmp_path, ending):
    leave_behind(tmp_path, "00000", place=process.place())
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.claim")}

    def work() -> None:
        with Worker(tmp_path) as worker:
            assert all(worker.claim(name) for name in NAMES)
            raise ending

    with pytest.raises(ending):
        work()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert not any(thread.name == "heartbeat" for thread in threading.enumerate())


def test_a_completed_cache_takes_the_folder_away(tmp_path):
    folder = tmp_path / "progress"
    folder.mkdir()
    with Worker(folder) as worker:
        assert worker.claim("00000")
        folder.rename(tmp_path / "done")
        with pytest.raises(FileNotFoundError):
            worker.claim("00001")
        worker.release("00000")
    assert not folder.exists()


def test_a_claim_that_the_disk_refuses_is_one_line_and_in_nobodys_way(tmp_path, monkeypatch):
    real = Path.open

    class Full:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *error: object):
            self.file.close()

        def write(self, data: bytes) -> int:
            raise OSError(28, "No space left on device")

    with Worker(tmp_path) as worker, Worker(tmp_path) as other:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "open", lambda self, *a, **k: Full(real(self, *a, **k)))
            with pytest.raises(WriteError, match=r"00000.claim can't be written \(No space left on device"):
                worker.claim("00000")
        assert other.claim("00000")


def test_a_worker_whose_file_can_t_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match="can't be written") as caught, Worker(tmp_path / "file"):
        pass
    assert len(str(caught.value).splitlines()) == 1


def test_a_worker_that_comes_when_the_folder_is_gone_is_told_so(tmp_path):
    with pytest.raises(FileNotFoundError), Worker(tmp_path / "gone"):
        pass
    assert list(tmp_path.iterdir()) == []


# --- Heartbeats ----------------------------------------------------------------------------------


def test_a_worker_at_work_touches_its_file_and_says_how_far_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "HEARTBEAT_SECONDS", 0.01)
    with Worker(tmp_path, "1/4") as worker:
        (file,) = tmp_path.glob("worker-*.json")
        worker.captured(30)
        worker.captured(12)
        touch(file, 1000)
        then = file.stat().st_mtime
        deadline = time.monotonic() + 60
        while file.stat().st_mtime == then or live_workers(tmp_path)[0].tokens != 42:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        (state,) = live_workers(tmp_path)
        assert (state.label, state.place, state.pid) == ("1/4", process.place(), os.getpid())
        file.unlink()  # by one whose clock is wrong: the next beat brings it back
        while not file.exists():
            assert time.monotonic() < deadline
            time.sleep(0.005)
    assert list(tmp_path.iterdir()) == []


def test_live_workers_are_those_at_work(tmp_path, owner):
    assert live_workers(tmp_path) == []
    leave_behind(tmp_path, age=DEAD_AFTER_SECONDS + 20, label="silent for long")
    leave_behind(tmp_path, age=-100 * DEAD_AFTER_SECONDS, label="of another time")
    leave_behind(tmp_path, place=process.place(), label="of this machine, and gone")
    leave_behind(tmp_path, age=20, label="of another machine")
    child = owner()
    before = sorted(tmp_path.iterdir())
    assert sorted(state.label for state in live_workers(tmp_path)) == ["", "of another machine"]
    assert sorted(tmp_path.iterdir()) == before  # looking changes nothing
    kill(child)
    assert [state.label for state in live_workers(tmp_path)] == ["of another machine"]
    assert live_workers(tmp_path / "nowhere") == []


# --- Nonsense ------------------------------------------------------------------------------------


def as_folder(path: Path) -> None:
    path.mkdir()
    (path / "more").touch()


NONSENSE: dict[str, Callable[[Path], object]] = {
    "no name of a worker": lambda path: path.write_text("somebody"),
    "no text": lambda path: path.write_bytes(b"\x80\x04\xff\x00"),
    "a path out of the folder": lambda path: path.write_text("x/../../../secret"),
    "a path with a NUL": lambda path: path.write_text("a\0b"),
    "an absolute path": lambda path: path.write_text("/etc/passwd"),
    "a line break": lambda path: path.write_text("0a-1-2\n"),
    "a megabyte": lambda path: path.write_bytes(b"0" * 2**20),
    "a terabyte of nothing": lambda path: (path.touch(), os.truncate(path, 2**40)),
    "a folder": as_folder,
    "a pipe": os.mkfifo,
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to a pipe outside": lambda path: path.symlink_to(path.parent.parent / "pipe"),
    "a link to a file outside": lambda path: path.symlink_to(path.parent.parent / "precious"),
}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder beside which there is something that is nobody's business."""
    (tmp_path / "precious").write_text("precious")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "progress").mkdir()
    return tmp_path / "progress"


@pytest.mark.usefixtures("bounded_memory")
@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_for_a_claim_is_nobodys_claim(folder, name):
    NONSENSE[name](folder / "00000.claim")
    with Worker(folder) as worker, Worker(folder) as other:
        assert race([worker, other], ["00000"]) == Counter(["00000"])
        for each in (worker, other):
            each.release("00000")
        assert other.claim("00000")
        assert not worker.claim("00000")
    assert (folder.parent / "precious").read_text() == "precious"


def worker_file(**values: object) -> Callable[[Path], object]:
    state = {"label": "", "host": "", "place": process.place(), "pid": 4242, "started": None, **values}
    return lambda path: path.write_text(json.dumps(state))


NONSENSE_WORKERS: dict[str, Callable[[Path], object]] = {
    **NONSENSE,
    "empty": lambda path: path.touch(),
    "nested 100,000 deep": lambda path: path.write_bytes(b"[" * 100_000),
    "nested 2,000 deep": lambda path: path.write_bytes(b"[" * 2_000 + b"]" * 2_000),
    "a list": lambda path: path.write_text("[]"),
    "an unknown key": worker_file(more=1),
    "a process id of text": worker_file(pid="1"),
    "a process id of thousands of digits": worker_file(pid=10**4000),
    "a process id beyond any": worker_file(pid=2**100),
    "process id 0, which is this process's group": worker_file(pid=0),
    "process id -1, which is every process": worker_file(pid=-1),
    "a start that is a number": worker_file(pid=os.getpid(), started=1),
    "a start of nonsense": worker_file(pid=os.getpid(), started="../../../etc/passwd"),
    "a place of another type": worker_file(place=None),
}


@pytest.mark.usefixtures("bounded_memory")
@pytest.mark.parametrize("name", NONSENSE_WORKERS)
def test_nonsense_for_a_worker_is_no_living_worker(folder, name):
    owner = f"{process.place()}-4242-17"
    NONSENSE_WORKERS[name](folder / f"worker-{owner}.json")
    (folder / "00000.claim").write_text(owner)
    assert live_workers(folder) == []
    with Worker(folder) as worker:
        assert [state.pid for state in live_workers(folder)] == [os.getpid()]
        assert worker.claim("00000")
    assert (folder.parent / "precious").read_text() == "precious"


@pytest.mark.parametrize("name", ["worker-.json", "worker-...json", "worker-\n.json", "worker-x~y.json"])
def test_strange_names_of_workers_are_nobodys(folder, name):
    worker_file(pid=os.getpid())(folder / name)
    with Worker(folder) as worker:
        assert worker.claim("00000")
    assert list(folder.glob("*.claim")) == []
