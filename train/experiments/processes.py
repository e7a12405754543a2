"""The processes of a sweep: each trains one run, writes to a log and may have a GPU of its own."""

from __future__ import annotations

import itertools
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pipeline.errors import DSparkError
from pipeline.remote.address import Place
from train.experiments.grid import Point
from train.runs.directory import read_progress

# Removed from the environment, so that a sweep under torchrun still starts single-process runs.
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def visible_gpus() -> list[str]:
    """Return the GPUs that a process may use, by their names in CUDA_VISIBLE_DEVICES."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        names = [name.strip() for name in listed.split(",")]
        return list(itertools.takewhile(lambda name: name not in ("", "-1"), names))  # as CUDA reads it
    return [str(number) for number in range(torch.cuda.device_count())]


def train_command(
    cache: Place, config_file: Path, run: Path, settings: Sequence[str], device: str
) -> list[str]:
    """Return the command line of one run."""
    # -P: not a train.py that happens to lie in the working directory.
    command = [sys.executable, "-P", "-m", "train", "--cache", str(cache), "--config", str(config_file)]
    command += ["--run", str(run), "--device", device]
    return command + [part for setting in settings for part in ("--set", setting)]


def last_error(log: Path, start: int = 0) -> str:
    """Return the last line of a log that begins with `error: `, or else its last line.

    Args:
        start: byte to read from.
    """
    with log.open("rb") as file:
        file.seek(start)
        text = file.read().decode(errors="replace")
    # splitlines also splits at the carriage returns of progress bars.
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or [""])[-1].removeprefix("error: ")


@dataclass
class Child:
    """A process that trains a run."""

    point: Point
    label: str
    place: str
    """The GPU, in words for a message. Empty if the run chooses its device itself."""
    slot: int
    run: Path
    log: Path
    log_start: int
    """Start of this process's output in the log, in bytes."""
    process: subprocess.Popen[bytes]
    started: float = field(default_factory=time.monotonic)
    signalled: bool = False

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def stopped_by(self, number: int) -> bool:
        """Return whether the process ended by a signal, after saving or before it handled signals."""
        return self.process.returncode in (128 + number, -number)

    def problem(self) -> str | None:
        """Return why the run is not complete after its process ended; None if it is."""
        code = self.process.returncode
        if code == 0:
            try:
                return None if read_progress(self.run).complete else "it ended before its last step"
            except DSparkError as error:
                return str(error)
        if code < 0:
            with suppress(ValueError):
                return f"killed by {signal.Signals(-code).name}"
        return last_error(self.log, self.log_start) or f"exit code {code}"


@dataclass(kw_only=True)
class Processes:
    """The processes of a sweep; a context manager that leaves none of them running."""

    cache: Place
    runs: Path
    device: str
    gpus: list[str]
    jobs: int
    at_work: list[Child] = field(default_factory=list)

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        """Terminate the processes that are left, and wait for them."""
        for child in self.at_work:
            child.process.terminate()
        for child in self.at_work:
            child.process.wait()

    def start(self, point: Point, label: str) -> Child:
        """Start or continue a run in the lowest free slot."""
        slot = min(set(range(self.jobs)) - {child.slot for child in self.at_work})
        environment = {name: value for name, value in os.environ.items() if name not in _TORCHRUN}
        path = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"], place = os.pathsep.join(path), ""
        if len(self.gpus) > 1:
            gpu = self.gpus[slot % len(self.gpus)]
            environment["CUDA_VISIBLE_DEVICES"], place = gpu, f" on GPU {gpu}"
        if self.jobs > 1:  # all processes together get as many threads as there are cores
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // self.jobs)))
        run, log = self.runs / point.name, self.runs / f"{point.name}.log"
        command = train_command(self.cache, point.file, run, point.settings, self.device)
        with log.open("ab") as file:
            file.write(f"$ {shlex.join(command)}\n".encode())
            file.flush()
            log_start = file.tell()
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # so that a terminal's Ctrl-C reaches it once, by `pass_on`
            )
        child = Child(point, label, place, slot, run, log, log_start, process)
        self.at_work.append(child)
        return child

    def ended(self) -> list[Child]:
        """Return the processes that have ended since the last call."""
        ended = [child for child in self.at_work if child.process.poll() is not None]
        self.at_work = [child for child in self.at_work if child not in ended]
        return ended

    def pass_on(self, number: int) -> None:
        """Send a signal to every process that has not had it."""
        for child in self.at_work:
            if not child.signalled:
                child.process.send_signal(number)
                child.signalled = True
