"""Held-out tau of several runs at equal cost: over the tokens and the time that training took."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline.text import duration
from train.experiments.report.data import RunData, number
from train.experiments.report.plots import begin_at, digits, number_axes, over
from train.experiments.report.svg import Panel, look, panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COSTS = {
    "tokens": ("Tau at equal tokens", "tokens trained on", lambda value: f"{value:,.0f} tokens"),
    "seconds": ("Tau at equal training time", "seconds of training", lambda value: duration(value)),
}
"""Title, axis and words of what training costs, by its name in metrics.jsonl."""


def several_kinds(runs: Sequence[RunData]) -> bool:
    """Tell whether the runs are of more than one kind of draft."""
    return len({run.kind for run in runs}) > 1


def described(run: RunData) -> str:
    """Name a run's kind, and K where an evaluation tells it."""
    return run.kind if run.slots is None else f"{run.kind}, K = {run.slots}"


def tau_curve(runs: Sequence[RunData], cost: str) -> Panel | None:
    """Draw held-out tau over a cost of training; None if no run has both.

    Args:
        cost: key of `COSTS`.
    """
    curves = {run.index: _points(run, cost) for run in runs}
    if not any(curves.values()):
        return None
    title, axis, say = COSTS[cost]

    def draw(axes: Axes) -> None:
        for run in runs:
            xs, taus = [[point[i] for point in curves[run.index]] for i in (0, 1)]
            # Not clipped at the edge, where the last evaluation has its mark.
            over(axes, xs, taus, look(run.index, markersize=6, clip_on=False))
        begin_at(axes, 1.0)
        number_axes(axes)

    def words(run: RunData) -> str:
        told = [f"{digits(tau)} after {say(x)}" for x, tau in curves[run.index]]
        return f"{run.name} ({described(run)}): {', '.join(told[:1] + told[1:][-1:]) or 'none'}"

    caption = "Held out, as training itself measured it: the higher curve has learned more from as much."
    alt = f"Held-out tau over {axis}. " + ". ".join(map(words, runs)) + "."
    return panel(f"kinds-{cost}", title, caption, alt, draw, x=axis, y="tokens per round")


def _points(run: RunData, cost: str) -> list[tuple[float, float]]:
    """Return the cost and the tau of each evaluation that has both."""
    both = [(number(line.get(cost)), number(line.get("tau"))) for line in run.held_out]
    return [(x, tau) for x, tau in both if x is not None and tau is not None]
