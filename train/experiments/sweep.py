"""A grid of runs over one cache: every run a process of its own, in a directory of its own."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from pipeline import config as configuration
from pipeline import files
from pipeline.cache import CacheReader, Identity
from pipeline.errors import ConfigError, DSparkError, RunError, UsageError
from pipeline.signals import stop_on_signals
from pipeline.text import duration
from train.config import RunConfig
from train.experiments.compare import compare, format_text
from train.runs.directory import check_run, read_progress
from train.trainer.setup import set_up

POLL_SECONDS = 0.1
# Were this itself one of several processes, its runs are not.
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LONGEST_NAME = 200  # bytes; file systems end at 255, and the log's name is longer
# A whole quoted string, or one character.
_TOKEN = re.compile(r"""'[^']*'|"(?:[^"\\]|\\.)*"|.""", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One run of the grid."""

    name: str
    """Of its directory."""
    settings: tuple[str, ...]
    """What `dspark train` is given with --set."""
    config: RunConfig
    """What these make of the config file."""


def split_values(text: str) -> list[str]:
    """Split at the commas outside brackets and quotes. Raises UsageError where these do not close."""
    values, depth = [""], 0
    for token in _TOKEN.findall(text):
        depth += (token in ("[", "{")) - (token in ("]", "}"))
        if token in ("'", '"') or depth < 0:
            break
        if token == "," and not depth:
            values.append("")
        else:
            values[-1] += token
    else:
        if not depth:
            return [value.strip() for value in values]
    raise UsageError(f"a bracket or a quote is not closed in {text!r}: close it, or leave it out")


def parse_settings(settings: Iterable[str]) -> dict[str, list[str]]:
    """The values of every --set by its key, in the order given.

    Raises:
        UsageError: no key, no value, an empty one, or one that was given before.
    """
    grid: dict[str, list[str]] = {}
    for setting in settings:
        key, sign, text = setting.partition("=")
        key = key.strip()
        if not sign or not key:
            raise UsageError(f"expected --set table.key=value or table.key=value,value,..., got {setting!r}")
        if key in grid:
            raise UsageError(f"--set {key} is given twice: give all its values to one, separated by commas")
        values = split_values(text)
        if "" in values:
            raise UsageError(f"--set {setting}: expected values separated by single commas, got an empty one")
        for value, count in Counter(values).items():
            if count > 1:
                raise UsageError(f"--set {setting}: expected different values, got {value} {count} times")
        grid[key] = values
    return grid


def run_names(grid: dict[str, list[str]]) -> list[str]:
    """A name for every point of a grid, the first key varying slowest: the settings that vary.

    They are safe as file names and do not change when a key that varies is given more values.
    """
    varied = [key for key, values in grid.items() if len(values) > 1]
    if not varied:
        return ["run"]
    tails = [key.rpartition(".")[2] for key in varied]
    short = [tail if tails.count(tail) == 1 else key for key, tail in zip(varied, tails, strict=True)]
    choices = list(itertools.product(*(grid[key] for key in varied)))
    plain = [
        ",".join(f"{_safe(key)}={_safe(value)}" for key, value in zip(short, choice, strict=True))
        for choice in choices
    ]
    times = Counter(plain)
    return [
        name
        if times[name] == 1 and len(name.encode()) <= _LONGEST_NAME
        else f"{name[: _LONGEST_NAME // 4]}~{hashlib.sha256(repr(choice).encode()).hexdigest()[:8]}"
        for name, choice in zip(plain, choices, strict=True)
    ]


def _safe(text: str) -> str:
    """A part of a file name, brackets and quotes left out, everything else unusual made a dash."""
    return re.sub(r"[^\w.+-]+", "-", re.sub(r"""[]["'{}]""", "", text))


def plan_grid(config_file: Path, settings: Iterable[str]) -> list[Point]:
    """Every run of a sweep, its config built and checked.

    Raises:
        UsageError: a setting that no run can have, or one of a single run, which is named.
    """
    grid = parse_settings(settings)
    values = configuration.load_toml(config_file)
    points: list[Point] = []
    names: dict[RunConfig, str] = {}
    for name, choice in zip(run_names(grid), itertools.product(*grid.values()), strict=True):
        chosen = tuple(f"{key}={value}" for key, value in zip(grid, choice, strict=True))
        try:
            config = configuration.build(
                RunConfig, configuration.apply_overrides(values, chosen), str(config_file)
            )
        except ConfigError as error:
            raise ConfigError(f"grid point {name}: {error}") from None
        if config in names:
            raise UsageError(
                f"grid points {names[config]} and {name} are the same run: drop one of the values"
            )
        names[config] = name
        points.append(Point(name=name, settings=chosen, config=config))
    return points


def visible_gpus() -> list[str]:
    """The GPUs that a process here may use, as CUDA_VISIBLE_DEVICES names them."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        names = [name.strip() for name in listed.split(",")]
        return list(itertools.takewhile(lambda name: name not in ("", "-1"), names))  # as CUDA reads it
    return [str(number) for number in range(torch.cuda.device_count())]


def train_command(
    cache: Path, config_file: Path, run: Path, settings: Sequence[str], device: str
) -> list[str]:
    """The command line of one run."""
    # -P: not a train.py that happens to lie in the working directory.
    command = [sys.executable, "-P", "-m", "train", "--cache", str(cache), "--config", str(config_file)]
    command += ["--run", str(run), "--device", device]
    return command + [part for setting in settings for part in ("--set", setting)]


def sweep(
    cache: Path,
    config_file: Path,
    runs: Path,
    settings: Iterable[str],
    *,
    device: str = "auto",
    jobs: int | None = None,
    say: Callable[[str], object] = print,
) -> None:
    """Train every run of a grid that is not complete, then compare the complete ones.

    Writes to `runs`: for every run its directory and `<name>.log`; and the config file as it was, so that
    it may be edited meanwhile.

    Args:
        settings: `table.key=value` or `table.key=value,value,...`; the first varies slowest.
        jobs: runs trained at once; by default one a GPU, and one where there is none.
        say: gets a line when a run begins and when it ends, and the table.

    Raises:
        DSparkError: a setting that some run can't have, or a cache that can't be read or lacks what a run
            asks for; nothing has been started or written then.
        RunError: runs failed, which did not stop the others.
        StoppedError: by a signal, which was passed on to the runs at work, and these have ended.
    """
    points = plan_grid(config_file, settings)
    if not config_file.is_file():
        raise ConfigError(f"{config_file} can be read only once, and every run reads it: give a plain file")
    points, identity = resolve(points, cache)
    gpus = visible_gpus() if device in ("auto", "cuda") else []
    jobs = jobs or max(1, len(gpus))
    text = config_file.read_bytes()
    runs.mkdir(parents=True, exist_ok=True)
    kept = runs / f"config-{hashlib.sha256(text).hexdigest()[:8]}.toml"
    files.publish_bytes(kept, text, replace=False)
    work = _Work(cache=cache, config_file=kept, runs=runs, device=device, gpus=gpus, jobs=jobs)

    waiting, complete, failed = list(enumerate(points, start=1)), set[str](), list[str]()
    with stop_on_signals() as stop:
        try:
            while work.at_work or (waiting and stop.signal is None):
                if stop.signal is not None:
                    work.pass_on(stop.signal)
                for child in work.ended():
                    problem = child.problem()
                    if problem is None:
                        complete.add(child.point.name)
                        say(f"{child.label}: {_tau(child.run)}, {duration(child.seconds)}")
                    elif stop.signal is not None and child.process.returncode in _stopped_codes(stop.signal):
                        say(f"{child.label}: stopped")
                    else:
                        failed.append(child.point.name)
                        say(f"{child.label}: failed: {problem}; log: {child.log}")
                while waiting and len(work.at_work) < jobs and stop.signal is None:
                    number, point = waiting.pop(0)
                    label = f"{number}/{len(points)} {point.name}"
                    if is_complete(runs / point.name, point.config, identity):
                        complete.add(point.name)
                        say(f"{label}: already complete, {_tau(runs / point.name)}")
                        continue
                    try:
                        child = work.start(point, label)
                    except OSError as error:
                        failed.append(point.name)
                        say(f"{label}: failed: {error.filename}: {error.strerror}")
                    else:
                        say(f"{label}: training{child.place}, log: {child.log}")
                if work.at_work:
                    time.sleep(POLL_SECONDS)
        finally:  # with an error of our own, or a second signal: nothing goes on unattended
            work.terminate()
        if len(complete) < len(points):
            stop.check(
                f"{len(complete)} of {len(points)} runs are complete, the others keep their checkpoints: "
                "the same command continues"
            )
    finished = [runs / point.name for point in points if point.name in complete]
    if finished:
        say("\n" + format_text(compare(finished)).rstrip("\n"))
    if failed:
        raise RunError(
            f"{len(failed)} of {len(points)} runs failed ({'; '.join(failed)}): see their logs in {runs}; "
            "the same command tries them again"
        )


def resolve(points: Sequence[Point], cache: Path) -> tuple[list[Point], Identity]:
    """The runs with their configs resolved as `dspark train` does it, and what the cache is.

    Raises:
        DSparkError: the cache can't be read, or lacks what a run asks for; that run is named.
    """
    identity, resolved = CacheReader(cache).manifest.identity, []
    for point in points:
        # sdpa runs everywhere: nothing is asked of a device here, the GPUs are the runs' own.
        anywhere = replace(point.config, draft=replace(point.config.draft, attention="sdpa"))
        try:
            config = set_up(cache, anywhere, torch.device("cpu")).config
        except DSparkError as error:
            raise type(error)(f"grid point {point.name}: {error}") from None
        draft = replace(config.draft, attention=point.config.draft.attention)
        resolved.append(replace(point, config=replace(config, draft=draft)))
    return resolved, identity


def is_complete(run: Path, config: RunConfig, identity: Identity) -> bool:
    """Whether a run with this resolved config over this cache is there and has nothing left to do.

    A complete run of something else is not: `dspark train` will say what differs.
    """
    try:
        check_run(run, config, identity, fresh=False)
        return read_progress(run).complete
    except DSparkError:
        return False


def _tau(run: Path) -> str:
    """What a complete run has come to."""
    evaluation = read_progress(run).evaluation
    return f"held-out tau {evaluation['tau']:.3f}" if evaluation else "nothing held out"


def _stopped_codes(number: int) -> tuple[int, int]:
    """How a process ends by a signal: saved and said so, or not yet ready to."""
    return 128 + number, -number


@dataclass
class _Child:
    """A run at work."""

    point: Point
    label: str
    place: str
    slot: int
    run: Path
    log: Path
    log_start: int
    process: subprocess.Popen[bytes]
    started: float = field(default_factory=time.monotonic)
    signalled: bool = False

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def problem(self) -> str | None:
        """Why it did not complete, once it has ended; None if it did."""
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


def last_error(log: Path, start: int = 0) -> str:
    """The last line in a log that says `error: `, or the last one at all, from byte `start` on."""
    with log.open("rb") as file:
        file.seek(start)
        text = file.read().decode(errors="replace")
    lines = [
        line.strip() for line in text.splitlines() if line.strip()
    ]  # progress bars' carriage returns too
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or [""])[-1].removeprefix("error: ")


@dataclass(kw_only=True)
class _Work:
    """The processes of a sweep."""

    cache: Path
    config_file: Path
    runs: Path
    device: str
    gpus: list[str]
    jobs: int
    at_work: list[_Child] = field(default_factory=list)

    def start(self, point: Point, label: str) -> _Child:
        """Begin a run, or go on with it."""
        slot = min(set(range(self.jobs)) - {child.slot for child in self.at_work})
        environment = {name: value for name, value in os.environ.items() if name not in _TORCHRUN}
        path = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"], place = os.pathsep.join(path), ""
        if len(self.gpus) > 1:
            gpu = self.gpus[slot % len(self.gpus)]
            environment["CUDA_VISIBLE_DEVICES"], place = gpu, f" on GPU {gpu}"
        if self.jobs > 1:  # as many threads as cores, all in all
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // self.jobs)))
        run, log = self.runs / point.name, self.runs / f"{point.name}.log"
        command = train_command(self.cache, self.config_file, run, point.settings, self.device)
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
                start_new_session=True,  # so that Ctrl-C in a terminal comes once, through us
            )
        child = _Child(point, label, place, slot, run, log, log_start, process)
        self.at_work.append(child)
        return child

    def ended(self) -> list[_Child]:
        """Those that have ended since the last time."""
        ended = [child for child in self.at_work if child.process.poll() is not None]
        self.at_work = [child for child in self.at_work if child not in ended]
        return ended

    def pass_on(self, number: int) -> None:
        """Send a signal to all that have not had it."""
        for child in self.at_work:
            if not child.signalled:
                child.process.send_signal(number)
                child.signalled = True

    def terminate(self) -> None:
        """End all that are left, and wait for them."""
        for child in self.at_work:
            child.process.terminate()
        for child in self.at_work:
            child.process.wait()
