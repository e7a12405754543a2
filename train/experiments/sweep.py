"""A sweep: train every run of a grid over one cache, each in a process and a directory of its own."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from pipeline import files
from pipeline.cache import CacheReader, Identity
from pipeline.errors import ConfigError, DSparkError, RunError
from pipeline.remote.address import Place
from pipeline.signals import StopRequest, stop_on_signals
from pipeline.text import duration
from train.config import RunConfig
from train.eval.validate import headline
from train.experiments.compare import compare, format_text
from train.experiments.grid import Point, plan_grid
from train.experiments.processes import Child, Processes, visible_gpus
from train.runs.changes import LENGTH, changed_settings
from train.runs.directory import check_run, load_run_config, read_progress
from train.trainer.setup import set_up

POLL_SECONDS = 0.1


def sweep(
    cache: Place,
    config_files: Sequence[Path],
    runs: Path,
    settings: Iterable[str],
    *,
    device: str = "auto",
    jobs: int | None = None,
    say: Callable[[str], object] = print,
) -> None:
    """Train every run of a grid that is not complete, then compare the complete ones.

    Writes a directory and `<name>.log` per run to `runs`, and a copy of each config file, so that the file
    may be edited meanwhile.

    Args:
        config_files: the first axis of the grid; several may be of several kinds of draft.
        settings: `table.key=value` or `table.key=value,value,...`; the first varies slowest.
        jobs: runs trained at once. The default is one per GPU, and one without a GPU.
        say: gets a line when a run begins and when it ends, and the table.

    Raises:
        DSparkError: a run can't have a setting, the cache can't be read, or it lacks what a run asks for.
            Nothing has been started or written then.
        RunError: runs failed, which did not stop the others.
        StoppedError: a signal came. It was passed on to the runs at work, and these have ended.
    """
    points = plan_grid(config_files, settings)
    for file in config_files:
        if not file.is_file():
            raise ConfigError(f"{file} can be read only once, and every run reads it: give a plain file")
    points, identity = resolve(points, cache)
    gpus = visible_gpus() if device in ("auto", "cuda") else []
    texts = {file: file.read_bytes() for file in config_files}
    runs.mkdir(parents=True, exist_ok=True)
    kept = {file: _keep(text, runs) for file, text in texts.items()}
    points = [replace(point, file=kept[point.file]) for point in points]
    processes = Processes(
        cache=cache,
        runs=runs,
        device=device,
        gpus=gpus,
        jobs=jobs or max(1, len(gpus)),
    )
    state = _Sweep(points, identity, processes, say)
    with stop_on_signals() as stop:
        with processes:  # after an error here, or a second signal, no run continues unattended
            state.train(stop)
        if len(state.complete) < len(points):
            stop.check(
                f"{len(state.complete)} of {len(points)} runs are complete, the others keep their "
                "checkpoints: the same command continues"
            )
    finished = [runs / point.name for point in points if point.name in state.complete]
    if finished:
        say("\n" + format_text(compare(finished)).rstrip("\n"))
    if state.failed:
        raise RunError(
            f"{len(state.failed)} of {len(points)} runs failed ({'; '.join(state.failed)}): see their logs "
            f"in {runs}; the same command tries them again"
        )


def _keep(text: bytes, runs: Path) -> Path:
    """Write a copy of a config file beside the runs."""
    kept = runs / f"config-{hashlib.sha256(text).hexdigest()[:8]}.toml"
    files.publish_bytes(kept, text, replace=False)
    return kept


@dataclass
class _Sweep:
    """The runs of a sweep and what has become of them."""

    points: Sequence[Point]
    identity: Identity
    processes: Processes
    say: Callable[[str], object]
    complete: set[str] = field(default_factory=set)
    failed: list[str] = field(default_factory=list)

    def train(self, stop: StopRequest) -> None:
        """Train every run. After a signal, pass it on, begin no other run, and wait for those at work."""
        waiting = deque(enumerate(self.points, start=1))
        while self.processes.at_work or (waiting and stop.signal is None):
            if stop.signal is not None:
                self.processes.pass_on(stop.signal)
            for child in self.processes.ended():
                self._end(child, stop)
            while waiting and len(self.processes.at_work) < self.processes.jobs and stop.signal is None:
                number, point = waiting.popleft()
                self._begin(point, f"{number}/{len(self.points)} {point.name}")
            if self.processes.at_work:
                time.sleep(POLL_SECONDS)

    def _begin(self, point: Point, label: str) -> None:
        """Start the process of a run, unless the run is complete."""
        run = self.processes.runs / point.name
        if is_complete(run, point.config, self.identity):
            self.complete.add(point.name)
            self.say(f"{label}: already complete, {_tau(run)}")
            return
        try:
            child = self.processes.start(point, label)
        except OSError as error:
            self.failed.append(point.name)
            self.say(f"{label}: failed: {error.filename}: {error.strerror}")
        else:
            self.say(f"{label}: training{child.place}, log: {child.log}")

    def _end(self, child: Child, stop: StopRequest) -> None:
        """Note and say what has become of a run after its process ended."""
        problem = child.problem()
        if problem is None:
            self.complete.add(child.point.name)
            self.say(f"{child.label}: {_tau(child.run)}, {duration(child.seconds)}")
        elif stop.signal is not None and child.stopped_by(stop.signal):
            self.say(f"{child.label}: stopped")
        else:
            self.failed.append(child.point.name)
            self.say(f"{child.label}: failed: {problem}; log: {child.log}")


def resolve(points: Sequence[Point], cache: Place) -> tuple[list[Point], Identity]:
    """Return the runs with their configs resolved as `dspark train` does it, and the cache's identity.

    Raises:
        DSparkError: the cache can't be read, or lacks what a run asks for. The message names the run.
    """
    identity, resolved = CacheReader(cache).manifest.identity, []
    for point in points:
        # sdpa runs everywhere, so no device is needed here: the GPUs are for the runs.
        anywhere = replace(point.config, draft=replace(point.config.draft, attention="sdpa"))
        try:
            config = set_up(cache, anywhere, torch.device("cpu")).config
        except DSparkError as error:
            raise type(error)(f"grid point {point.name}: {error}") from None
        draft = replace(config.draft, attention=point.config.draft.attention)
        resolved.append(replace(point, config=replace(config, draft=draft)))
    return resolved, identity


def is_complete(run: Path, config: RunConfig, identity: Identity) -> bool:
    """Return whether a directory holds a complete run with this resolved config over this cache.

    For a complete run of something else it is False: `dspark train` will say what differs.
    """
    try:
        check_run(run, config, identity, fresh=False)
        longer = changed_settings(load_run_config(run), config).keys() & {*LENGTH}
        return read_progress(run).complete and not longer
    except DSparkError:
        return False


def _tau(run: Path) -> str:
    """Describe how good the draft of a complete run is."""
    evaluation = read_progress(run).evaluation
    return headline(evaluation) if evaluation else "nothing held out"
