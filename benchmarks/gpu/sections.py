"""The sections of `python -m benchmarks.gpu`, in the order in which they run."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.gpu.figures import Figure
from benchmarks.gpu.place import Place


@dataclass(frozen=True)
class Section:
    """A part that runs in a process of its own."""

    name: str
    about: str
    work: str
    """Function as `module:name`; it takes a Place and returns its figures."""
    seconds: int
    """Estimate for an H100, not measured. A section begins only if so much is left of the budget."""
    needs: tuple[str, ...] = ()
    """Packages beyond those that every section needs."""
    keeps_for: tuple[str, ...] = ()
    """The later sections that use its scratch."""

    @property
    def most_seconds(self) -> int:
        """The seconds after which it is stopped, and has failed."""
        return 3 * self.seconds + 60

    def missing(self) -> list[str]:
        """Return the packages that it needs and this Python lacks."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]

    def function(self) -> Callable[[Place], list[Figure]]:
        """Import and return its function."""
        module, _, name = self.work.partition(":")
        return getattr(importlib.import_module(module), name)


# The packages that a machine for training has are not named here.
_ALL = (
    Section("machine", "what it is, and what its units reach", "benchmarks.gpu.machine:machine", 20),
    Section(
        "tiny", "a tiny target: capture to speculation, killed and resumed", "benchmarks.gpu.runs:tiny", 80
    ),
    Section("loss", "the loss against its definition", "benchmarks.gpu.shapes:loss", 60),
    Section("step", "parts of a training step, share of the peak", "benchmarks.gpu.shapes:step", 60),
    Section("codecs", "encoding and decoding on the device", "benchmarks.gpu.states:codecs", 15),
    Section("loader", "from the page cache to the device", "benchmarks.gpu.states:loader", 45),
    Section(
        "capture",
        "against the bare forward",
        "benchmarks.gpu.states:capture",
        90,
        keeps_for=("ranks", "train"),
    ),
    Section("ranks", "ddp and fsdp on two GPUs", "benchmarks.gpu.ranks:ranks", 90),
    Section("train", "the real command: waits, host syncs, memory", "benchmarks.gpu.syncs:train", 45),
    Section("tests", "pytest -m gpu", "benchmarks.gpu.suite:tests", 120, needs=("pytest", "hypothesis")),
    Section("example", "the example's target, as tiny", "benchmarks.gpu.runs:example", 120),
)
SECTIONS = {section.name: section for section in _ALL}
