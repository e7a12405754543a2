"""Where a run's figures are also logged, as `train.report_to` asks: TensorBoard, wandb, trackio.

The packages are optional and imported only when named. What they show is a copy: metrics.jsonl, which
the loop writes itself, has every figure, so a tracker that fails is dropped and the run goes on.
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
from train.runtime.console import say, warn

PROJECT = "dspark"  # unless $WANDB_PROJECT or $TRACKIO_PROJECT says otherwise
FINISH_SECONDS = 300.0  # wandb would wait for ever for a network that is gone; `wandb sync` sends the rest


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a tracker is opened with."""

    run: Path
    """The run's directory; its name is what the run is called."""
    id: str
    """Stays the same over every resume of the run."""
    config: dict[str, Any]
    """Flat settings, `table.key` -> value."""
    step: int
    """Optimiser steps done before: the next figures are of a later one."""


class Tracker(Protocol):
    """One place figures are logged to. What it raises, on opening or later, is handled by `Trackers`."""

    where: str
    """Where a user looks at the figures."""

    def __init__(self, start: Start) -> None: ...

    def log(self, step: int, scalars: dict[str, float]) -> None:
        """Log figures of a step; a step may be logged more than once, with other names."""

    def close(self, *, failed: bool) -> None:
        """Write out what is pending; `failed` when the run ended by an error."""


class TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, start: Start):
        from torch.utils.tensorboard import SummaryWriter

        self.where = str(start.run / "tensorboard")
        # Of a run that died after its last checkpoint, the steps that are now done again are not shown twice.
        self._writer = SummaryWriter(self.where, purge_step=start.step + 1)
        settings = "\n".join(f"    {name} = {value}" for name, value in start.config.items())
        self._writer.add_text("config", settings, start.step)
        self._writer.flush()

    def log(self, step: int, scalars: dict[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # a killed run has what it logged

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
        self._run.log(scalars, step=step)  # a step it has already, from before a crash, stays as it was

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class Trackio:
    """A run in trackio's own folder ($TRACKIO_DIR), or on a Space ($TRACKIO_SPACE_ID).

    It keeps whatever it is given: steps done again after a crash have two points.
    """

    def __init__(self, start: Start):
        import trackio

        self._trackio = trackio
        project = os.environ.get("TRACKIO_PROJECT") or PROJECT
        # Resumed by name: no other run may have it.
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
"""By the name in `train.report_to`, which is also the package's and the extra's."""


def check_trackers(names: Iterable[str]) -> None:
    """Raises ConfigError when a tracker's package is not installed; imports none."""
    for name in names:
        found = importlib.util.find_spec(name)
        if found is None or found.origin is None:  # no origin: a mere folder of that name, as wandb leaves
            raise ConfigError(
                f'train.report_to names "{name}", which is not installed: '
                f"pip install 'dspark-pipeline[{name}]'"
            )


class Trackers:
    """The trackers of a run, opened together; a context manager.

    Only one process of a run may have them (rank 0).

    Args:
        names: of TRACKERS, their packages checked by `check_trackers`.
        run: the run's directory, which exists.
        identity_file: keeps the id that trackers know the run by.
        config: flat settings, `table.key` -> value.
        step: optimiser steps done before, 0 for a new run.

    Raises:
        RunError: one of them can't be opened.
    """

    def __init__(
        self, names: Iterable[str], *, run: Path, identity_file: Path, config: dict[str, Any], step: int
    ):
        self._open: dict[str, Tracker] = {}
        for name in names:
            start = Start(run=run, id=_identity(identity_file), config=config, step=step)
            try:
                tracker = self._open[name] = TRACKERS[name](start)
            except Exception as error:  # whatever a foreign library raises
                self.close(failed=True)
                raise RunError(
                    f"train.report_to: {name} can't be opened ({_reason(error)}): fix that, "
                    "or leave it out of train.report_to"
                ) from error
            say(f"{name}: {tracker.where}")

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Log a line of metrics.jsonl. Raises nothing: a tracker that fails is warned of and dropped."""
        scalars = flat_scalars(values)
        for name, tracker in list(self._open.items()):
            try:
                tracker.log(step, scalars)
            except Exception as error:
                del self._open[name]
                warn(
                    f"{name} failed at step {step} ({_reason(error)}) and is logged to no more; "
                    "metrics.jsonl has every figure"
                )
                with suppress(Exception):
                    tracker.close(failed=True)

    def close(self, *, failed: bool = False) -> None:
        """Close what is open. Raises nothing, and may be called again."""
        while self._open:
            name, tracker = self._open.popitem()
            try:
                tracker.close(failed=failed)
            except Exception as error:
                warn(
                    f"{name} failed when it was closed ({_reason(error)}) and may lack figures; "
                    "metrics.jsonl has every one"
                )

    def __enter__(self) -> Trackers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(failed=kind is not None and not issubclass(kind, StoppedError))


def flat_scalars(values: dict[str, Any], prefix: str = "train/") -> dict[str, float]:
    """The numbers of a line of metrics.jsonl, by the names they are logged under.

    A list is one scalar a position, counted from 1; the held-out figures are under `held_out/`.
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
    """Return the id that trackers know a run by: made at its first start, read ever after."""
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
            f'{path}: expected {{"id": "..."}} as a run writes it; remove it to be logged as a new run'
        )
    return identity


def _reason(error: Exception) -> str:
    """An error of another library in one short line."""
    return " ".join(str(error).split())[:200] or type(error).__name__
