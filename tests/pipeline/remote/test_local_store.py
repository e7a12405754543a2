"""The local store: many processes, a byte limit, and a kill at any moment."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline.cache.remote.local import LocalStore, default_store
from pipeline.errors import ConfigError

SIZE = 1000
LIMIT = 4 * SIZE
FILES = 12


def content(number: int) -> bytes:
    return hashlib.sha256(str(number).encode()).digest() * 32


def read(store: LocalStore, number: int, pause: float = 0.0) -> bytes | None:
    """Fetch a file and read it; None if it was evicted in between."""

    def fetch(path: Path) -> None:
        with path.open("r+b") as file:
            file.write(content(number)[: SIZE // 2])
            file.flush()
            time.sleep(pause)
            file.write(content(number)[SIZE // 2 : SIZE])

    path = store.file(f"key/fetched/choice/{number}.safetensors", SIZE, fetch)
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def work(folder: str, seed: int) -> None:
    """Read files at random until killed, as a process of its own. Prints a line if one is wrong."""
    store, draw = LocalStore(Path(folder), LIMIT), random.Random(seed)
    while True:
        number = draw.randrange(FILES)
        data = read(store, number, pause=0.002)
        if data is not None and data != content(number)[:SIZE]:
            print("wrong", number, flush=True)


def used(folder: Path) -> int:
    """Return the bytes in the store, files being fetched included, while none comes or goes."""
    sizes: dict[int, int] = {}
    with LocalStore(folder, LIMIT).folder_lock(""):
        for path in folder.glob("*/fetched/*/*"):
            with suppress(FileNotFoundError):  # renamed: the same file has another name now
                found = path.stat()
                sizes[found.st_ino] = found.st_size
    return sum(sizes.values())


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    store = LocalStore(tmp_path, LIMIT)
    for number in range(4):
        read(store, number)
        os.utime(tmp_path / f"key/fetched/choice/{number}.safetensors", (1000 + number,) * 2)
    read(store, 0)  # used again
    read(store, 7)
    left = {int(path.stem) for path in tmp_path.glob("key/fetched/choice/*.safetensors")}
    assert left == {0, 2, 3, 7}


def test_a_failed_fetch_leaves_nothing(tmp_path: Path) -> None:
    def fails(_path: Path) -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        LocalStore(tmp_path, LIMIT).file("key/fetched/choice/1.safetensors", SIZE, fails)
    assert not used(tmp_path)


def test_what_a_process_of_another_machine_or_boot_left_goes(tmp_path: Path) -> None:
    """Its name tells nothing. It goes when nothing was written to it for long, so no fetch waits for ever."""
    folder = tmp_path / "key/fetched/choice"
    folder.mkdir(parents=True)
    left = folder / ".1.safetensors~elsewhere~1.partial"
    left.write_bytes(bytes(LIMIT))
    os.utime(left, (1000, 1000))
    assert read(LocalStore(tmp_path, LIMIT), 1) == content(1)[:SIZE]
    assert not left.exists()


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a shard of 4 kB does not fit .* raise train.local_cache_bytes"):
        LocalStore(tmp_path, LIMIT).file("key/fetched/choice/1.safetensors", LIMIT + 1, lambda _path: None)


def test_processes_share_it_and_are_killed_at_any_moment(tmp_path: Path) -> None:
    """Nothing wrong is read, the limit holds at every moment, and what dead processes began goes."""
    draw = random.Random(0)

    def start(seed: int) -> subprocess.Popen:
        code = f"from tests.pipeline.remote.test_local_store import work; work({str(tmp_path)!r}, {seed})"
        return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)

    workers = [start(seed) for seed in range(3)]
    said = []
    try:
        for kill in range(6):
            until = time.monotonic() + 0.5 + draw.random() / 2
            while time.monotonic() < until:
                assert used(tmp_path) <= LIMIT
            victim = workers.pop(0)
            victim.send_signal(signal.SIGKILL)
            said.append(victim.communicate()[0])
            workers.append(start(10 + kill))
    finally:
        for worker in workers:
            worker.kill()
            said.append(worker.communicate()[0])
    assert not any(said)
    store = LocalStore(tmp_path, LIMIT)
    for number in range(FILES):
        assert read(store, number) == content(number)[:SIZE]
    assert not list(tmp_path.glob("*/fetched/*/.*"))


def test_the_default_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSPARK_LOCAL_CACHE", str(tmp_path / "a" / "b"))
    store = default_store()
    assert store.folder == tmp_path / "a" / "b"
    assert store.limit > 0
    monkeypatch.delenv("DSPARK_LOCAL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_store(limit=5) == LocalStore(tmp_path / "dspark-pipeline", 5)


def test_temporary_folders_of_killed_processes_are_removed_and_of_living_ones_not(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from pipeline.cache.remote.local import LocalStore\n"
        "with LocalStore(Path(sys.argv[1]), 0).temporary() as folder:\n"
        "    (folder / 'shard').write_text('x'); print(folder, flush=True); time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    theirs = Path(process.stdout.readline().strip())
    with LocalStore(tmp_path, 0).temporary() as ours:
        assert theirs.is_dir()
        assert (theirs / "shard").exists()
        assert ours != theirs
    assert not ours.exists()
    process.kill()
    process.wait()
    with LocalStore(tmp_path, 0).temporary() as ours:
        assert not theirs.exists()
        assert ours.is_dir()
    process.stdout.close()


def test_only_a_full_store_looks_at_every_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[int] = []
    real = LocalStore._files
    monkeypatch.setattr(LocalStore, "_files", lambda self: (looked.append(1), real(self))[1])
    store = LocalStore(tmp_path, 40 * SIZE)
    for number in range(40):
        read(store, number)
    assert len(looked) == 1  # to begin with
    assert used(tmp_path) == 40 * SIZE
    for number in range(40, 60):
        read(store, number)
    assert len(looked) - 1 == 10  # a twentieth, two files, goes at once
    assert 38 * SIZE <= used(tmp_path) <= 40 * SIZE
    (tmp_path / "locks" / "bytes").write_text("nonsense")
    read(store, 99)
    assert used(tmp_path) <= 40 * SIZE
