"""`dspark ...` in processes of their own, forked from one that has imported everything: a second each."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tests.capture.conftest import tree

_CONTEXT = multiprocessing.get_context("forkserver")
_MODELS = [f"transformers.models.{name}.modeling_{name}" for name in ("llama", "qwen3")]
_STAGES = ["tests.processes", "capture.run", "capture.cli", "train.trainer.trainer", "train.cli.train"]
_CONTEXT.set_forkserver_preload([*_STAGES, "pipeline.cli", *_MODELS, "tests.warm"])
PATIENCE_SECONDS = 120


def _work(folder: Path, arguments: list[str], before: Callable[[], None], variables: dict[str, str]) -> None:
    """The life of such a process."""
    for number, name in ((1, "out"), (2, "err")):
        descriptor = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
    os.environ.update(variables)
    sys.argv = ["dspark", *arguments]
    before()
    from pipeline.cli import main

    try:
        main()
    finally:
        (folder / "peak").write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))


def nothing() -> None:
    """What most processes do before they begin."""


def one_thread() -> None:
    """Compute as the tests themselves do: on one thread, so that sums are the same to the last bit."""
    torch.set_num_threads(1)


class Dspark:
    """A `dspark` command at work.

    Args:
        folder: for its output; made.
        before: called in it first, to break something; a function of a module.
    """

    def __init__(
        self,
        folder: Path,
        *arguments: str | Path,
        before: Callable[[], None] = nothing,
        **variables: str,
    ):
        folder.mkdir(exist_ok=True)
        self.folder = folder
        # Of the rest it has what was set when the first one started.
        kept = {
            n: v for n, v in os.environ.items() if n == "DSPARK_TOKENS" or n.startswith("AWS_")
        } | variables
        work = (folder, [str(a) for a in arguments], before, kept)
        self.process = _CONTEXT.Process(target=_work, args=work)
        self.process.start()

    def wait(self) -> int:
        """Its exit code; minus the signal that killed it."""
        self.process.join(PATIENCE_SECONDS)
        if self.process.exitcode is None:
            self.process.kill()  # or pytest itself would wait for it
            raise AssertionError(f"it hangs: {self.err}")
        return self.process.exitcode

    def wait_until(self, condition: Callable[[], object]) -> bool:
        """Wait for something to become true; False if it ended before."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            if time.monotonic() > deadline:
                self.process.kill()
                raise AssertionError(f"it hangs: {self.err}")
            if self.process.exitcode is not None:
                return bool(condition())
            time.sleep(0.001)
        return True

    def send(self, number: int) -> None:
        """A signal to it."""
        os.kill(self.process.pid, number)

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text()

    @property
    def err(self) -> str:
        path = self.folder / "err"
        return path.read_text() if path.exists() else ""

    @property
    def errors(self) -> list[str]:
        """What it says for the user to act on; one line, and never a traceback."""
        assert "Traceback" not in self.err, self.err
        return [line for line in self.err.splitlines() if line.startswith("error: ")]

    @property
    def peak_bytes(self) -> int:
        """The most memory it had."""
        return int((self.folder / "peak").read_text())


def start_ranks(
    folder: Path,
    count: int,
    *arguments: str | Path,
    before: Callable[[], None] = one_thread,
    **variables: str,
) -> list[Dspark]:
    """A command as `count` processes that torchrun would start on one machine.

    Args:
        arguments: `{rank}` stands for each one's number.
        before: as in `Dspark`; it calls `one_thread` too.
    """
    folder.mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **variables}
    return [
        Dspark(
            folder / str(i),
            *(str(argument).replace("{rank}", str(i)) for argument in arguments),
            before=before,
            RANK=str(i),
            LOCAL_RANK=str(i),
            **world,
        )
        for i in range(count)
    ]


def finished_shards(cache: Path) -> list[str]:
    """The records of finished shards."""
    return sorted(path.name for path in cache.glob("progress/[0-9]*.json"))


def leftovers(cache: Path) -> list[str]:
    """What no process may leave behind but one that was killed."""
    names = tree(cache) if cache.exists() else {}
    return [name for name in names if name.endswith((".partial", ".claim")) or "worker-" in name]


def count_tokenised_rows() -> None:
    """Let every row that is tokenised add a byte to the file $TOKENISED."""
    from capture.data.conversations import RowTokenizer

    real = RowTokenizer.tokenize

    def tokenize(self, *given):
        with Path(os.environ["TOKENISED"]).open("ab") as file:
            file.write(b".")
        return real(self, *given)

    RowTokenizer.tokenize = tokenize


def die_at() -> None:
    """Be killed right before the $DIE_AT-th change to the disk."""
    left, lock = [int(os.environ["DIE_AT"])], threading.Lock()

    def deadly(real: Callable) -> Callable:
        def change(*given, **options):
            with lock:
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return real(*given, **options)

        return change

    for name in ("fsync", "replace", "rename", "unlink", "rmdir"):
        setattr(os, name, deadly(getattr(os, name)))


def die_in_the_middle() -> None:
    """Be killed when half of the file $DIE_IN is written, the $DIE_AT-th time that it is."""
    from pipeline import files

    name, left, publish = os.environ["DIE_IN"], [int(os.environ["DIE_AT"])], files.publish_bytes

    def half(pieces):
        whole = b"".join(map(bytes, pieces))
        yield memoryview(whole[: len(whole) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    def publish_bytes(path: Path, *pieces, **options):
        if path.name == name:
            left[0] -= 1
            if left[0] == 0:
                files._blocks = half
        return publish(path, *pieces, **options)

    files.publish_bytes = publish_bytes


def small_files_only() -> None:
    """As if the disk were full: no file may grow beyond 48 KiB."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (48 * 1024, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
