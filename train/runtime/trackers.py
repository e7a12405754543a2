"""Trackers that a run's figures are also logged to (`train.report_to`): TensorBoard, wandb, trackio.

The packages are optional and imported only when named. They receive copies: metrics.jsonl, which the
training loop writes itself, has every figure. So a tracker that fails is dropped and the run continues.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import uuid
from collections.abc import Iterable
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pipeline.errors import ConfigError, RunError, StoppedError
from pipeline.files import publish_bytes
from pipeline.text import one_line
from train.runtime.console import say, warn

PROJECT = "dspark"  # $WANDB_PROJECT or $TRACKIO_PROJECT overrides it
FINISH_SECONDS = 300.0  # without a limit wandb waits forever for a lost network; `wandb sync` sends the rest


@dataclass(frozen=True, kw_only=True)
class Start:
    """Arguments that a tracker is opened with."""

    run: Path
    """The run's directory; its name is the run's name."""
    id: str
    """Id of the run, the same each time the run is resumed."""
    config: dict[str, Any]
    """Flat settings, `table.key` -> value."""
    step: int
    """Optimiser steps done before; the next figures belong to a later step."""


class Tracker(Protocol):
    """A destination of figures. `Trackers` handles every exception that it raises."""

    where: str
    """Address or path at which a user finds the figures."""

    def __init__(self, start: Start) -> None: ...

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Log figures of a step. A step may be logged several times, with different names."""

    def close(self, *, failed: bool) -> None:
        """Write pending figures. `failed` means that the run ended with an error."""


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, start: Start):
        from torch.utils.tensorboard import SummaryWriter

        self.where = str(start.run / "tensorboard")
        # A run that died after its last checkpoint repeats steps: purge them, so that none is shown twice.
        self._writer = SummaryWriter(self.where, purge_step=start.step + 1)
        settings = "\n".join(f"    {name} = {value}" for name, value in start.config.items())
        self._writer.add_text("config", settings, start.step)
        self._writer.flush()

    def log(self, step: int, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # so that a killed run keeps its figures

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class Wandb:
    """A run on a Weights & Biases server, or in RUN/wandb with WANDB_MODE=offline."""

    def __init__(self, start: Start):
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or PROJECT,
            name=start.run.resolve().name,
            id=start.id,
            resume="allow",
            dir=start.run,
            config=start.config,
            settings=wandb.Settings(silent=True, console="off", finish_timeout=FINISH_SECONDS),
        )
        self.where = str(start.run / "wandb") if self._run.offline else str(self._run.url)

    def log(self, step: int, scalars: dict[str, float]) -> None:
        self._run.log(scalars, step=step)  # wandb ignores steps that it already has from before a crash

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class Trackio:
    """A run in trackio's own folder ($TRACKIO_DIR), or on a Space ($TRACKIO_SPACE_ID).

    Trackio keeps duplicates: a step repeated after a crash has two points.
    """

    def __init__(self, start: Start):
        import trackio

        self._trackio = trackio
        project = os.environ.get("TRACKIO_PROJECT") or PROJECT
        # Trackio resumes by name, so the name must be unique.
        name = f"{start.run.resolve().name}-{start.id}"
        with redirect_stdout(io.StringIO()):
            trackio.init(project=project, name=name, config=start.config, resume="allow")
        self.where = f"run {name}, see `trackio show --project {project}`"

    def log(self, step: int, scalars: dict[str, float]) -> None:
        self._trackio.log(scalars, step=step)

    def close(self, *, failed: bool) -> None:
        with redirect_stdout(io.StringIO()):
            self._trackio.finish()


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}
"""Trackers by their name in `train.report_to`, which is also the name of the package and of the extra."""


def check_trackers(names: Iterable[str]) -> None:
    """Raise ConfigError if a tracker's package is not installed. Import none of them."""
    for name in names:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # no origin: only a folder of that name, such as RUN/wandb
            raise ConfigError(
                f'train.report_to names "{name}", but that package is not installed: '
                f"pip install 'dspark-pipeline[{name}]'"
            )


class Trackers:
    """The trackers of a run, opened together; a context manager.

    Only the first rank of a run may open them.

    Args:
        names: keys of TRACKERS, their packages checked by `check_trackers`.
        run: the run's directory, which must exist.
        identity_file: file that keeps the run's id.
        config: flat settings, `table.key` -> value.
        step: optimiser steps done before, 0 for a new run.

    Raises:
        RunError: a tracker can't be opened.
    """

    def __init__(
        self, names: Iterable[str], *, run: Path, identity_file: Path, config: dict[str, Any], step: int
    ):
        self._open: dict[str, Tracker] = {}
        for name in names:
            start = Start(run=run, id=_identity(identity_file), config=config, step=step)
            try:
                tracker = self._open[name] = TRACKERS[name](start)
            except Exception as error:  # third-party libraries raise anything
                self.close(failed=True)
                raise RunError(
                    f"train.report_to: {name} can't be opened ({one_line(error)}): fix that, "
                    f"or remove {name} from train.report_to"
                ) from error
            say(f"{name}: {tracker.where}")

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Log a line of metrics.jsonl. Raise nothing: a tracker that fails is dropped with a warning."""
        scalars = flat_scalars(values)
        for name, tracker in list(self._open.items()):
            try:
                tracker.log(step, scalars)
            except Exception as error:
                del self._open[name]
                warn(
                    f"{name} failed at step {step} ({one_line(error)}) and gets no more figures; "
                    "metrics.jsonl has all of them"
                )
                with suppress(Exception):
                    tracker.close(failed=True)

    def close(self, *, failed: bool = False) -> None:
        """Close the open trackers. Raise nothing; a second call does nothing."""
        while self._open:
            name, tracker = self._open.popitem()
            try:
                tracker.close(failed=failed)
            except Exception as error:
                warn(
                    f"{name} failed on closing ({one_line(error)}) and may lack figures; "
                    "metrics.jsonl has all of them"
                )

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None and not issubclass(kind, StoppedError))


def flat_scalars(values: dict[str, Any], prefix: str = "train/") -> dict[str, float]:
    """Return the numbers of a line of metrics.jsonl, by the names that they are logged under.

    A list becomes one scalar per position, counted from 1. The held-out figures are under `held_out/`.
    """
    found: dict[str, float] = {}
    for name, value in values.items():
        if name == "held_out" and isinstance(value, dict):
            found |= flat_scalars(value, "held_out/")
        elif isinstance(value, list | tuple):
            numbered = {f"{name}/{position}": item for position, item in enumerate(value, start=1)}
            found |= flat_scalars(numbered, prefix)
        elif isinstance(value, int | float) and name != "step":
            found[f"{prefix}{name}"] = value
    return found


def _identity(path: Path) -> str:
    """Return the id that trackers know a run by. The first start creates it; later starts read it."""
    if not path.exists():
        identity = uuid.uuid4().hex[:12]
        publish_bytes(path, json.dumps({"id": identity}).encode() + b"\n")
        return identity
    try:
        identity = json.loads(path.read_text(encoding="utf-8"))["id"]
    except (OSError, ValueError, LookupError, TypeError):
        identity = None
    if not isinstance(identity, str) or not identity.isalnum():
        raise RunError(
            f'{path}: expected {{"id": "..."}}, got something else; remove it to log this run as a new one'
        )
    return identity
