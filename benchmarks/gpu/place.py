"""The machine that a section runs on: its device, and how large the shapes may be there."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from benchmarks.gpu.figures import Row

Shape = TypeVar("Shape")

# Free bytes of a GPU for the shapes of that name: Qwen3-4B's own, and with fewer layers and blocks.
FULL_BYTES, SMALL_BYTES = 44 * 2**30, 15 * 2**30
FULL, SMALL, TINY = "full", "small", "tiny"


@dataclass(frozen=True)
class Place:
    """Machine and folder of a section."""

    folder: Path
    """Scratch of this section alone, removed once it has passed."""
    pretend: bool
    """The device is the pretend one: nothing is recorded, and speed is not judged."""
    size: str = TINY
    """Name of the shapes that fit its memory: full, small or tiny."""
    notes: list[str] = field(default_factory=list)
    """Parts that the section had to leave out, each in a few words."""

    def pick(self, full: Shape, small: Shape, tiny: Shape) -> Shape:
        """Return the value for this size."""
        return {FULL: full, SMALL: small, TINY: tiny}[self.size]

    def sized(self) -> Place:
        """Return this place with the size that the free memory of its GPU allows.

        Raises:
            RuntimeError: this Python's torch has no CUDA device.
        """
        import torch

        if not torch.cuda.is_available():
            built = torch.version.cuda or "no CUDA"
            raise RuntimeError(
                f"expected a CUDA device, but torch {torch.__version__} (built for {built}) finds none: run "
                "on a GPU machine with a torch for CUDA, or pass --pretend"
            )
        free, _ = torch.cuda.mem_get_info()
        fitting = FULL if free >= FULL_BYTES else SMALL if free >= SMALL_BYTES else TINY
        return replace(self, size=TINY if self.pretend else fitting)

    def record(self, benchmark: str, rows: list[Row]) -> list[Row]:
        """Append rows to results.csv, unless the device is a pretend one. Return them."""
        import torch

        from benchmarks.record import record

        if not self.pretend:
            record(benchmark, torch.device("cuda", 0), rows)
        return rows
