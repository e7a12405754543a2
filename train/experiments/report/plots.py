"""The panels of the page: drawings of runs' figures. A panel that no run has figures for is None."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from train.experiments.report.data import RunData, by_position, curve, filled, gaps, reliability, thresholds
from train.experiments.report.svg import COLOURS, FAINT, INK, MUTED, Panel, dark, look, panel
from train.runs.figures import ThresholdRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STEP = "optimiser step"
MOST_POINTS = 500
"""Of a curve; of a longer one, the lowest and the highest of each stretch are drawn."""
MOST_MARKS = 40
"""Of a curve of held-out figures; a longer one is a thin line."""
MOST_TEMPERATURES = 4
"""In a panel of live decoding."""
LABELLED = (0.0, 0.2, 0.4, 0.6, 0.8)
"""Thresholds written beside their points."""
GIVEN = "accept_given_prefix"
ROUND = [1, 2, 2.5, 5, 10]
"""Ticks are multiples of these, by powers of ten."""
WHEN = {
    "as trained": {"color": COLOURS[0], "marker": "o", "linestyle": "-"},
    "before": {"color": COLOURS[1], "marker": "s", "linestyle": (0, (4, 1.5))},
    "after": {"color": COLOURS[0], "marker": "o", "linestyle": "-"},
}
"""Look of a state of the confidence head, the same for every run."""


def digits(value: float | None, places: int = 3) -> str:
    """Write a figure for people; a dash for none."""
    if value is None or not math.isfinite(value):
        return "\N{EN DASH}"
    return f"{value:,.{places}f}" if abs(value) < 1e15 else f"{value:.3g}"


def listed(values: Sequence[float | None], places: int = 3) -> str:
    """Write figures in a row."""
    return ", ".join(digits(value, places) for value in values)


def training_curve(
    runs: Sequence[RunData],
    name: str,
    title: str,
    unit: str,
    caption: str,
    *,
    lowest: float | None = None,
) -> Panel | None:
    """Draw a figure over steps, in training and held out."""
    log = {run.index: curve(run.log, name) for run in runs}
    held_out = {run.index: curve(run.held_out, name) for run in runs}
    marks = {i: _held_out_look(i, len(values), len(runs)) for i, (_, values) in held_out.items()}
    if not any(values for _, values in (*log.values(), *held_out.values())):
        return None

    def draw(axes: Axes) -> None:
        for run in runs:
            over(axes, *log[run.index], look(run.index, markersize=3.5))
            over(axes, *held_out[run.index], marks[run.index], most_marks=MOST_MARKS)
        if len(runs) == 1:
            line = {"marker": ""} if len(held_out[0][1]) > MOST_MARKS else {}
            has_held_out = [("held out", {**marks[0], **line})] if held_out[0][1] else []
            _legend(axes, [("training", look(0, marker="")), *has_held_out])
        if lowest is not None:
            begin_at(axes, lowest)
        number_axes(axes)

    def ends(what: str, steps: list[float], values: list[float]) -> str | None:
        points = [(step, value) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
        told = [f"{digits(value)} at step {step:,}" for step, value in points]
        return f"{what} {' to '.join(dict.fromkeys([told[0], told[-1]]))}" if told else None

    def words(run: RunData) -> str:
        both = [ends("training", *log[run.index]), ends("held out", *held_out[run.index])]
        return f"{run.name}: {'; '.join(filter(None, both)) or 'none'}"

    if any(not math.isfinite(v) for _, values in log.values() for v in values):
        caption = f"{caption.removesuffix('.')}; gaps are steps without a finite figure."
    alt = f"{title} over {STEP}s. " + ". ".join(map(words, runs)) + "."
    return panel(f"training-{name}", title, caption, alt, draw, x=STEP, y=unit)


def log_curve(
    runs: Sequence[RunData],
    name: str,
    title: str,
    unit: str,
    caption: str,
    *,
    scale: float = 1,
    places: int = 0,
) -> Panel | None:
    """Draw a figure of the log that starts at zero: speed, waiting, memory."""
    curves = {}
    for run in runs:
        steps, values = curve(run.log, name)
        curves[run.index] = (steps, [value * scale for value in values])
    if not any(values for _, values in curves.values()):
        return None

    def draw(axes: Axes) -> None:
        for run in runs:
            over(axes, *curves[run.index], look(run.index, markersize=3.5))
        top = max((v for _, values in curves.values() for v in values if math.isfinite(v)), default=0)
        axes.set_ylim(0, top * 1.08 or 1)
        number_axes(axes)

    def words(run: RunData) -> str:
        finite = [value for value in curves[run.index][1] if math.isfinite(value)]
        if not finite:
            return f"{run.name}: none"
        low, high = digits(min(finite), places), digits(max(finite), places)
        return f"{run.name}: {digits(finite[-1], places)} at last, {low} to {high} in all"

    alt = f"{title} over {STEP}s, {unit}. " + ". ".join(map(words, runs)) + "."
    return panel(f"cost-{name}", title, caption, alt, draw, x=STEP, y=unit)


def acceptance(
    runs: Sequence[RunData], key: str, title: str, caption: str, *, untrained: bool = False
) -> Panel | None:
    """Draw acceptance by position in the block; of a run alone also when the target is greedy."""
    series = []  # (words, figures, look)
    for run in runs:
        alone, own = len(runs) == 1, look(run.index, linewidth=1.8)
        series.append((run, "sampling" if alone else run.name, by_position(run, key), own))
        if alone:
            own = {**look(1), "linestyle": "none", "markerfacecolor": "none", "markeredgecolor": COLOURS[1]}
            greedy = by_position(run, f"greedy_{key}")
            series.append((run, "greedy", greedy, {**own, "markersize": 6.5, "markeredgewidth": 1.2}))
    if untrained:
        own = {"color": MUTED, "marker": "", "linestyle": (0, (1.2, 1.4)), "linewidth": 1.5, "clip_on": False}
        for run in runs:
            fresh = run.evaluation.untrained if run.evaluation else None
            who = "untrained" if len(runs) == 1 else f"untrained as {run.name}"
            series.append((run, who, fresh.accept_by_position if fresh else (), own))
    series = [row for row in series if any(value is not None for value in row[2])]
    if not series:
        return None

    def draw(axes: Axes) -> None:
        for _, _, values, own in series:
            axes.plot(range(1, len(values) + 1), gaps(values), **own)
        if len(runs) == 1:
            _legend(axes, [(words, own) for _, words, _, own in series])
            tops = [row[2] for row in series if row[1] != "untrained"]
            for k, value in enumerate(series[0][2]):
                if value is not None and len(series[0][2]) <= 8:
                    top = max(values[k] or 0 for values in tops if k < len(values))
                    place = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center"}
                    axes.annotate(f"{value:.2f}", (k + 1, top), fontsize=8.5, color=INK, **place)
        elif untrained:
            _legend(axes, [("untrained", series[-1][3])])
        position_axis(axes, max(len(values) for _, _, values, _ in series))
        _from_zero(axes, [v for _, _, values, _ in series for v in values])

    alt = f"{title}, from position 1. " + ". ".join(f"{who}: {listed(v)}" for _, who, v, _ in series) + "."
    return panel(f"acceptance-{key}", title, caption, alt, draw, x="position in the block", y="accepted")


def live(runs: Sequence[RunData], temperatures: Sequence[float]) -> Panel | None:
    """Draw what was accepted in live decoding, beside what held-out samples had promised.

    Args:
        temperatures: one, or several for a run alone, which are told apart by colour.
    """
    rows = []  # (words, live, held out, look)
    looks = _temperature_looks(temperatures)
    for run in runs:
        for row in run.live:
            if row.temperature in temperatures:
                kind = temperature_name(row.temperature)
                own = look(looks[row.temperature] if len(runs) == 1 else run.index, linewidth=1.8)
                there = row.offline.accept_given_prefix if row.offline else ()
                rows.append((kind if len(runs) == 1 else run.name, row.accept_given_prefix, there, own))
    rows = [row for row in rows if any(value is not None for value in row[1])]
    if not rows:
        return None

    def hollow(own: dict[str, Any]) -> dict[str, Any]:
        ring = {"markerfacecolor": "none", "markeredgecolor": own["color"], "markeredgewidth": 1.2}
        return {**own, "linestyle": "none", "markersize": 7.5, **ring}

    def draw(axes: Axes) -> None:
        for _, here, there, own in rows:
            axes.plot(range(1, len(here) + 1), gaps(here), **own)
            axes.plot(range(1, len(there) + 1), gaps(there), **hollow(own))
        if len(runs) == 1:
            names = [kind.replace("temperature ", "T ") if len(rows) > 2 else kind for kind, *_ in rows]
            _legend(axes, [(name, own) for name, (_, _, _, own) in zip(names, rows, strict=True)])
        else:
            own = look(0, color=MUTED)
            _legend(axes, [("live", own), ("held out", hollow(own))])
        position_axis(axes, max(len(values) for row in rows for values in row[1:3]))
        _from_zero(axes, [value for row in rows for values in row[1:3] for value in values])

    title = "Live acceptance" + (f", {temperature_name(temperatures[0])}" if len(temperatures) == 1 else "")
    caption = (
        "Lines are live decoding, hollow marks what held-out samples had promised for it. Live rounds begin "
        "where the last one ended, and so yield a bit less than tau."
    )
    said = [f"{who}: live {listed(here)}; held out {listed(there)}" for who, here, there, _ in rows]
    alt = f"{title}, given that the tokens before are accepted, from position 1. {'. '.join(said)}."
    key = "live-" + "-".join(f"{t:g}" for t in temperatures).replace(".", "_")
    return panel(key, title, caption, alt, draw, x="position in the block", y="accepted")


def _temperature_looks(temperatures: Sequence[float]) -> dict[float, int]:
    """Choose each one's look: greedy has the second, as in the panels beside it, the others have the rest."""
    free: Iterator[int] = iter([0, *range(2, len(temperatures) + 2)])
    return {t: 1 if t == 0 else next(free) for t in temperatures}


def temperature_name(temperature: float) -> str:
    """Name a temperature of decoding."""
    return "greedy" if temperature == 0 else f"temperature {temperature:g}"


def reliability_diagram(run: RunData, kind: str, title: str, caption: str) -> Panel | None:
    """Draw predicted against observed acceptance, and how often each confidence occurs."""
    states = reliability(run, kind)
    if not states:
        return None
    last = list(states)[-1]

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.9, linestyle=(0, (1.2, 1.6)))
        bins = filled(states[last])
        most = max((row.count for row in bins), default=1)
        for row in bins:  # a quarter of the height at most, below everything else
            width = row.high - row.low
            axes.bar(row.low, 0.25 * row.count / most, width * 0.92, align="edge", color="#dfe7ee")
        for when, told in states.items():
            predicted, actual = (
                [getattr(row, key) for row in filled(told)] for key in ("predicted", "actual")
            )
            label = f"{when}, ECE {digits(told.ece)}"
            axes.plot(predicted, actual, label=label, **{**look(0), **WHEN[when]})
        axes.set(xlim=(0, 1), ylim=(0, 1))
        axes.legend(loc="upper left", bbox_to_anchor=(0.01, 0.99))

    def words(when: str) -> str:
        told = states[when]
        pairs = ", ".join(f"{row.predicted:.2f} to {row.actual:.2f}" for row in filled(told))
        return f"{when}: calibration error {digits(told.ece)}, predicted to observed {pairs}"

    alt = f"{title}, {run.name}. " + ". ".join(map(words, states)) + "."
    key = f"reliability-{kind}-{run.index}"
    return panel(key, title, caption, alt, draw, x="confidence", y="accepted")


def threshold_panel(run: RunData, runs: Sequence[RunData]) -> Panel | None:
    """Draw what verifying less buys a run, with the others in the background."""
    states = thresholds(run)
    if not states:
        return None
    others = [
        list(sweeps.values())[-1] for other in runs if other is not run and (sweeps := thresholds(other))
    ]

    def points(rows: list[ThresholdRow]) -> tuple[list[float], list[float]]:
        return [row.acceptance for row in rows], [row.tokens for row in rows]

    def draw(axes: Axes) -> None:
        for rows in others:
            axes.plot(*points(rows), color=FAINT, linewidth=1.1)
        for when, rows in states.items():
            axes.plot(*points(rows), label=when, **{**look(0), **WHEN[when]})
        for row in list(states.values())[-1]:
            if any(abs(row.threshold - wanted) < 1e-9 for wanted in LABELLED):
                place = {"xytext": (5, 4), "textcoords": "offset points", "fontsize": 8.5, "color": INK}
                axes.annotate(f"{row.threshold:g}", (row.acceptance, row.tokens), **place)
        axes.set_xlim(0, 1)
        axes.margins(y=0.12)
        handles, labels = axes.get_legend_handles_labels()
        if others:
            handles.append(axes.plot([], [], color=FAINT, linewidth=1.1)[0])
            labels.append("other runs")
        axes.legend(handles, labels, loc="upper right", bbox_to_anchor=(1.0, 0.99))

    def words(when: str) -> str:
        rows = [row for row in states[when] if any(abs(row.threshold - t) < 1e-9 for t in LABELLED)]
        said = (
            f"at {row.threshold:g} {digits(row.tokens)} tokens and {digits(row.acceptance)}" for row in rows
        )
        return f"{when}: {'; '.join(said)}"

    title = "Threshold sweep"
    caption = "Numbers are thresholds: verifying only what is more confident loses tokens, and wastes less."
    alt = (
        f"Tokens a round against acceptance of verified tokens, {run.name}. {'. '.join(map(words, states))}."
    )
    x = "acceptance of verified tokens"
    return panel(f"thresholds-{run.index}", title, caption, alt, draw, x=x, y="tokens per round")


def over(
    axes: Axes, steps: list[float], values: list[float], own: dict[str, Any], *, most_marks: int = 20
) -> None:
    """Draw a curve; its points are marked where they are few, and where they have no neighbour."""
    marked = range(len(values)) if len(values) <= most_marks else None
    if len(values) > MOST_POINTS:
        steps, values = thinned(steps, values)
        own = {**own, "linewidth": 0.8}  # or noise would be a solid band
    if marked is None:
        finite = [False, *(math.isfinite(value) for value in values), False]
        marked = [i for i in range(len(values)) if finite[i + 1] and not finite[i] and not finite[i + 2]]
    axes.plot(steps, values, markevery=list(marked), **own)


def thinned(steps: list[float], values: list[float]) -> tuple[list[float], list[float]]:
    """Keep at most MOST_POINTS of a curve: of each stretch the lowest, the highest and a gap."""
    count = len(values)
    if count <= MOST_POINTS:
        return steps, values
    kept = {0, count - 1}
    stretches = (MOST_POINTS - 2) // 3
    for i in range(stretches):
        own = range(i * count // stretches, (i + 1) * count // stretches)
        finite = [k for k in own if math.isfinite(values[k])]
        if finite:
            kept |= {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)}
        if len(finite) < len(own):
            kept.add(next(k for k in own if not math.isfinite(values[k])))
    return [steps[k] for k in sorted(kept)], [values[k] for k in sorted(kept)]


def _held_out_look(index: int, points: int, runs: int) -> dict[str, Any]:
    """Choose the look of held-out figures: outlined marks, or a thin line where they are many."""
    if points > MOST_MARKS:
        return look(index, color=dark(index), linestyle="-", linewidth=0.9, markersize=2, zorder=4)
    # Not clipped at the edge, where a draft that never helps has its marks.
    own = look(index, linestyle="none", markeredgecolor=INK, zorder=4, clip_on=False)
    return {**own, "markersize": 7 if runs == 1 else 6, "markeredgewidth": 0.9 if runs == 1 else 0.6}


def begin_at(axes: Axes, lowest: float) -> None:
    """Begin an axis at `lowest` where figures allow, with room for marks at the other end."""
    _, low, _, high = axes.dataLim.extents
    bottom = min(lowest, low)
    axes.set_ylim(bottom, high + 0.06 * (high - bottom or 1))


def _legend(axes: Axes, entries: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """Add a legend above the axes on the right, at the height of their unit."""
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], label=label, **own) for label, own in entries]
    place = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.015), "ncols": len(lines)}
    tight = {"handlelength": 1.5, "handletextpad": 0.4, "columnspacing": 0.8} if len(lines) > 3 else {}
    axes.legend(handles=lines, **place, **tight)


def number_axes(axes: Axes) -> None:
    """Number axes that begin at 0 on the left."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=ROUND, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=ROUND))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _short(x)))
    plain = axes.yaxis.get_major_formatter()
    low, high = axes.get_ylim()
    if max(abs(low), abs(high)) >= 1000:
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _short(y)))
    elif hasattr(plain, "set_useOffset"):
        plain.set_useOffset(False)
        plain.set_scientific(False)


def _short(value: float) -> str:
    for unit, one in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= max(one, 1e4):
            return f"{value / one:g}{unit}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:g}"


def position_axis(axes: Axes, count: int) -> None:
    """Number an axis from 1 to `count`."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(0.6, count + 0.4)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=min(count + 1, 10), integer=True))


def _from_zero(axes: Axes, values: Sequence[float | None]) -> None:
    from matplotlib.ticker import MaxNLocator

    top = max((value for value in values if value is not None), default=0)
    axes.set_ylim(0, max(min(1.0, top * 1.25), 0.05))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=ROUND))
