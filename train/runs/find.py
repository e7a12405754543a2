"""Find the run that a path names: its directory, or a checkpoint's path as commands print it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import UsageError
from train.runs.names import BEST, CHECKPOINTS, CONFIG, LATEST


@dataclass(frozen=True)
class NamedRun:
    """A run, and one of its checkpoints if the path named one."""

    path: Path
    """Directory of the run."""
    checkpoint: str | None = None
    """Name of the checkpoint: `latest`, `best` or such as `step-000400`; None if the path is the run's."""

    def checkpoint_or(self, asked: str | None, default: str = BEST) -> str:
        """Return the checkpoint that the path or an option names; `default` if neither does.

        Raises:
            UsageError: they name two different ones.
        """
        if asked and self.checkpoint and asked != self.checkpoint:
            raise UsageError(
                f"{self.path / self.checkpoint} and --checkpoint {asked} name two checkpoints: pass the run "
                f"{self.path} with --checkpoint, or the checkpoint's path alone"
            )
        return asked or self.checkpoint or default


def find_run(path: Path) -> NamedRun:
    """Return the run that a path names: its directory, RUN/latest, RUN/best or RUN/checkpoints/step-N.

    A path that is none of these is returned as a run, for its reader to refuse.
    """
    if (path / CONFIG).is_file():
        return NamedRun(path)
    if path.name in (LATEST, BEST) and (path.parent / CONFIG).is_file():
        return NamedRun(path.parent, path.name)
    for place in (path, path.resolve()):  # also a link to a checkpoint, or a shell's place inside of one
        run = place.parent.parent
        if place.parent.name == CHECKPOINTS and (run / CONFIG).is_file():
            return NamedRun(run, place.name)
    return NamedRun(path)
