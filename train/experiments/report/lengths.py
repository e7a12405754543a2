"""Expected speed-up by the number of drafted tokens a round, as `dspark speculate --measure` found it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from train.experiments.report.data import RunData, gaps
from train.experiments.report.plots import digits, listed, position_axis, temperature_name
from train.experiments.report.svg import MUTED, Panel, look, panel
from train.experiments.report.tables import Table
from train.runs.figures import Lengths

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def lengths_of(run: RunData, temperature: float) -> Lengths | None:
    """Return what was measured of a run at a temperature."""
    return next((row.lengths for row in run.live if row.temperature == temperature), None)


def measured_temperatures(runs: Sequence[RunData]) -> list[float]:
    """Collect the temperatures at which steps of some length were timed, from low to high."""
    return sorted({row.temperature for run in runs for row in run.live if row.lengths and row.lengths.rows})


def speedup_curve(runs: Sequence[RunData], temperature: float) -> Panel:
    """Draw the expected speed-up over the number of drafted tokens; larger marks are the recommended ones."""
    found = [(run, lengths) for run in runs if (lengths := lengths_of(run, temperature)) and lengths.rows]

    def draw(axes: Axes) -> None:
        for run, lengths in found:
            at = [row.length for row in lengths.rows]
            speedups = gaps([row.speedup for row in lengths.rows])
            axes.plot(at, speedups, **look(run.index, linewidth=1.8))
            for row in lengths.rows:
                if row.length == lengths.num_speculative_tokens and row.speedup is not None:
                    axes.plot([row.length], [row.speedup], **look(run.index, markersize=9, zorder=4))
        position_axis(axes, max(row.length for _, lengths in found for row in lengths.rows))
        axes.plot(axes.get_xlim(), [1, 1], color=MUTED, linewidth=0.9, linestyle=(0, (1.2, 1.6)))
        axes.set_ylim(0, max(1.0, axes.dataLim.ymax) * 1.1)

    def words(run: RunData, lengths: Lengths) -> str:
        best = lengths.num_speculative_tokens
        said = f"recommended {best}" if best else "none is faster"
        return f"{run.name}: {listed([row.speedup for row in lengths.rows], 2)}; {said}"

    name = temperature_name(temperature)
    title = f"Expected speed-up, {name}"
    caption = "Of one request; the dotted line is plain decoding, the large mark the recommended length."
    alt = f"{title}, from 1 drafted token. {'. '.join(words(*each) for each in found)}."
    key = f"lengths-{temperature:g}".replace(".", "_")
    return panel(key, title, caption, alt, draw, x="drafted tokens a round", y="times as fast")


def length_table(runs: Sequence[RunData]) -> Table | None:
    """Make the table of the recommended lengths: a row per run and temperature."""
    rows: list[tuple[str | RunData, list[str]]] = []
    for run in runs:
        for live in run.live:
            if live.lengths and live.lengths.rows:
                best = live.lengths.num_speculative_tokens
                expected = next((row.speedup for row in live.lengths.rows if row.length == best), None)
                cells = [f"{live.temperature:g}", str(best), digits(expected, 2), live.lengths.acceptance]
                rows.append((run, [*cells, digits(live.lengths.plain_ms, 1), run.speculation.device]))
    if not rows:
        return None
    columns = [
        "run",
        "temperature",
        "drafted tokens",
        "speed-up",
        "acceptance",
        "ms per plain step",
        "device",
    ]
    note = "0 drafted tokens: no number of them is expected to be faster than plain decoding."
    return Table("Recommended num_speculative_tokens", columns, rows, note=note)
