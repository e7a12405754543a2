"""Figures of a section, their limits, and the table of them all."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

Row = tuple[str, str, float, str]
"""Case, metric, value and unit: what the benchmarks return and results.csv holds."""

PASSED, SHORT, FAILED, SKIPPED, NOT_RUN = "passed", "fell short", "failed", "skipped", "not run"


class SkipSection(Exception):  # noqa: N818  not an error
    """A section can't run on this machine; its message says what is missing."""


@dataclass(frozen=True)
class Limit:
    """Bounds of a figure."""

    at_most: float | None = None
    at_least: float | None = None
    speed: bool = False
    """Depends on the speed or the size of the device, so it means nothing on a pretend one."""

    def __str__(self) -> str:
        if self.at_least == self.at_most is not None:
            return f"= {self.at_most:.4g}"
        bounds = {"<=": self.at_most, ">=": self.at_least}
        return " ".join(f"{sign} {value:.4g}" for sign, value in bounds.items() if value is not None)

    def holds(self, value: float) -> bool:
        """Return whether a value is within the bounds; NaN never is."""
        high = math.inf if self.at_most is None else self.at_most
        low = -math.inf if self.at_least is None else self.at_least
        return low <= value <= high


@dataclass(frozen=True)
class Figure:
    """One measured value."""

    case: str
    metric: str
    value: float
    unit: str = ""
    limit: str = ""
    """Its limit in words; empty for a figure that only informs."""
    holds: bool = True
    """The value is within its limit, or has none that counts here."""

    @property
    def verdict(self) -> str:
        """`ok`, `FELL SHORT`, or `-` where no limit counts."""
        if not self.holds:
            return "FELL SHORT"
        return "ok" if self.limit else "-"


def judged(rows: Iterable[Row], limits: dict[str, Limit], *, pretend: bool) -> list[Figure]:
    """Return rows as figures, with their limits.

    Args:
        limits: by a part of the row's "case metric unit". Each must be met by at least one row.
        pretend: leave out limits on speed, which a pretend device can't meet.
    """
    figures, unused = [], set(limits)
    for case, metric, value, unit in rows:
        words = f"{case} {metric} {unit}"
        key = next((each for each in limits if each in words), None)
        unused.discard(key)
        if key is None or (limits[key].speed and pretend):
            figures.append(Figure(case, metric, value, unit))
        else:
            limit = limits[key]
            figures.append(Figure(case, metric, value, unit, str(limit), limit.holds(value)))
    assert not unused, f"limits of nothing that was measured: {unused}"
    return figures


@dataclass
class Outcome:
    """Outcome of a section."""

    section: str
    status: str
    figures: list[Figure] = field(default_factory=list)
    reason: str = ""
    """One line: why it failed, was skipped or did not run, or what it left out."""
    seconds: float = 0.0
    log: str = ""
    """Path of its output."""
    earlier: bool = False
    """It was finished by an earlier call."""

    @property
    def bad(self) -> bool:
        """True if this makes the whole command fail."""
        return self.status in (SHORT, FAILED)

    def save(self, path: Path) -> None:
        """Write it as JSON, whole or not at all."""
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self)))
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Outcome:
        """Read what `save` wrote."""
        values = json.loads(path.read_text())
        values["figures"] = [Figure(**figure) for figure in values["figures"]]
        return cls(**values)


def lines_of(outcome: Outcome) -> list[str]:
    """Return a section's lines of the table."""
    when = ", by an earlier call" if outcome.earlier else ""
    took = f"{outcome.seconds:.0f} s{when}" if outcome.seconds or outcome.earlier else ""
    reason = f": {outcome.reason}" if outcome.reason else ""
    about = "; ".join(filter(None, [took, f"log {outcome.log}" if outcome.log else ""]))
    lines = [f"== {outcome.section}: {outcome.status}{reason}{f' ({about})' if about else ''}"]
    return lines + [line_of(figure) for figure in outcome.figures]


def line_of(figure: Figure) -> str:
    """Return a figure's line of the table."""
    cells = (figure.case, figure.metric, f"{figure.value:.4g}", figure.unit, figure.limit)
    return _columns(*cells, figure.verdict)


def heading() -> str:
    """Return the table's first line."""
    return _columns("case", "figure", "value", "unit", "limit", "verdict")


def _columns(case: str, metric: str, value: str, unit: str, limit: str, verdict: str) -> str:
    return f"{case:50} {metric:34} {value:>11} {unit:16} {limit:12} {verdict}".rstrip()


def failures(outcomes: Iterable[Outcome]) -> list[str]:
    """Return a line for each figure that fell short and each section that failed."""
    lines = []
    for outcome in outcomes:
        lines += [f"{outcome.section}: {line_of(each)}" for each in outcome.figures if not each.holds]
        if outcome.status == FAILED:
            lines.append(f"{outcome.section}: failed: {outcome.reason} (log {outcome.log})")
    return lines
