"""Drawings of `dspark report`, point by point."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.train.reports import (
    Points,
    add_speculation,
    by_label,
    change_figures,
    check_whole,
    copy_run,
    drawn,
    figures_of,
    log_of,
    numbered,
    points,
    report,
    seen,
    write_log,
)
from train.experiments.report.plots import MOST_MARKS, MOST_POINTS, thinned
from train.experiments.report.svg import COLOURS, look

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def steps_of(lines: list[dict[str, Any]], name: str, scale: float = 1) -> Points:
    return [(line["step"], line[name] * scale) for line in lines]


def test_curves_are_of_the_log(axes: dict[str, Axes], runs: list[Path]) -> None:
    log, held_out = log_of(runs[0])
    for name in ("tau", "accept_rate", "loss", "l1_loss", "ce_loss", "confidence_loss"):
        assert by_label(axes[f"training-{name}"]) == {
            "training": steps_of(log, name),
            "held out": steps_of(held_out, name),
        }


@pytest.mark.parametrize(
    ("name", "scale"), [("tokens_per_s", 1), ("data_wait_percent", 1), ("peak_memory_bytes", 1e-9)]
)
def test_costs_are_of_the_log(axes: dict[str, Axes], runs: list[Path], name: str, scale: float) -> None:
    (line,) = seen(axes[f"cost-{name}"])
    assert points(line) == steps_of(log_of(runs[0])[0], name, scale)
    assert axes[f"cost-{name}"].get_ylim()[0] == 0


def test_acceptance_is_of_the_evaluation(axes: dict[str, Axes], runs: list[Path]) -> None:
    evaluation = figures_of(runs[0], "evaluation.json")
    marginal, given = (axes[f"acceptance-{key}"] for key in ("accept_by_position", "accept_given_prefix"))
    assert by_label(marginal) == {
        "sampling": numbered(evaluation["accept_by_position"]),
        "greedy": numbered(evaluation["greedy_accept_by_position"]),
        "untrained": numbered(evaluation["untrained"]["accept_by_position"]),
    }
    assert by_label(given) == {
        "sampling": numbered(evaluation["accept_given_prefix"]),
        "greedy": numbered(evaluation["greedy_accept_given_prefix"]),
    }
    for panel, key in ((marginal, "accept_by_position"), (given, "accept_given_prefix")):
        assert [text.get_text() for text in panel.texts[:-1]] == [f"{a:.2f}" for a in evaluation[key]]


def test_live_acceptance_is_beside_what_was_promised(axes: dict[str, Axes], runs: list[Path]) -> None:
    greedy, sampling = figures_of(runs[0], "speculation.json")["runs"]
    key = "accept_given_prefix"
    assert by_label(axes["live-0-1"]) == {
        "greedy": numbered(greedy[key]),
        "temperature 1": numbered(sampling[key]),
    }
    hollow = [line for line in seen(axes["live-0-1"]) if line.get_linestyle() == "None"]
    assert {line.get_color(): points(line) for line in hollow} == {
        COLOURS[1]: numbered(greedy["offline"][key]),
        COLOURS[0]: numbered(sampling["offline"][key]),
    }


@pytest.mark.parametrize("kind", ["prefix", "slot"])
def test_reliability_is_what_was_said_and_what_happened(
    axes: dict[str, Axes], runs: list[Path], kind: str
) -> None:
    told = figures_of(runs[0], "calibration.json")["report"]
    panel = axes[f"reliability-{kind}-0"]
    bins = {when: [b for b in told[when][kind]["bins"] if b["count"]] for when in ("before", "after")}
    assert bins["before"] != bins["after"]
    assert by_label(panel) == {
        f"{when}, ECE {told[when][kind]['ece']:.3f}": [(b["predicted"], b["actual"]) for b in rows]
        for when, rows in bins.items()
    }
    diagonal = seen(panel)[0]
    assert points(diagonal) == [(0, 0), (1, 1)]
    most = max(b["count"] for b in bins["after"])
    assert [(bar.get_x(), bar.get_height()) for bar in panel.patches] == [
        (b["low"], 0.25 * b["count"] / most) for b in bins["after"]
    ]
    assert panel.patches[0].get_width() == pytest.approx(1 / 15, rel=0.1)
    assert (panel.get_xlim(), panel.get_ylim()) == ((0, 1), (0, 1))


def test_thresholds_are_the_sweep(axes: dict[str, Axes], runs: list[Path]) -> None:
    sweeps = figures_of(runs[0], "calibration.json")["thresholds"]
    assert sweeps["before"] != sweeps["after"]
    panel = axes["thresholds-0"]
    rows = {when: [r for r in sweeps[when] if r["acceptance"] is not None] for when in ("before", "after")}
    assert by_label(panel) == {
        when: [(row["acceptance"], row["tokens"]) for row in kept] for when, kept in rows.items()
    }
    written = {text.get_text(): text.xy for text in panel.texts[:-1]}
    assert written == {
        f"{row['threshold']:g}": (row["acceptance"], row["tokens"])
        for row in rows["after"]
        if row["threshold"] in (0.0, 0.2, 0.4, 0.6, 0.8)
    }
    assert (panel.get_xlabel(), panel.texts[-1].get_text()) == (
        "acceptance of verified tokens",
        "tokens per round",
    )


def test_as_trained_is_of_the_evaluation(runs: list[Path], tmp_path: Path) -> None:
    run = copy_run(runs[0], tmp_path / "raw")
    (run / "best" / "calibration.json").unlink()
    evaluation, axes = figures_of(run, "evaluation.json"), drawn(run)
    told = evaluation["confidence"]["slot"]
    assert by_label(axes["reliability-slot-0"]) == {
        f"as trained, ECE {told['ece']:.3f}": [
            (row["predicted"], row["actual"]) for row in told["bins"] if row["count"]
        ]
    }
    assert by_label(axes["thresholds-0"]) == {
        "as trained": [
            (row["acceptance"], row["tokens"])
            for row in evaluation["thresholds"]
            if row["acceptance"] is not None
        ]
    }


def test_each_run_has_its_colour(runs: list[Path], tmp_path: Path) -> None:
    other = copy_run(runs[0], tmp_path / "other")
    shifted = [0.125, 0.0625, 0.03125]
    change_figures(other, "evaluation.json", lambda told: told.update(accept_by_position=shifted))
    change_figures(
        other, "speculation.json", lambda told: told["runs"][1].update(accept_given_prefix=shifted)
    )
    write_log(other, [{**line, "loss": line["loss"] + 1} for line in log_of(runs[0])[0]])
    axes = drawn(other, runs[0])

    def lines(key: str) -> dict[str, Points]:
        found = [line for line in seen(axes[key]) if line.get_linestyle() != "None"]
        return {line.get_color(): points(line) for line in found if line.get_color() in COLOURS}

    log, _ = log_of(runs[0])
    loss = steps_of(log, "loss")
    assert lines("training-loss") == {COLOURS[0]: [(s, v + 1) for s, v in loss], COLOURS[1]: loss}
    theirs = figures_of(runs[0], "evaluation.json")["accept_by_position"]
    assert lines("acceptance-accept_by_position") == {
        COLOURS[0]: numbered(shifted),
        COLOURS[1]: numbered(theirs),
    }
    theirs = figures_of(runs[0], "speculation.json")["runs"][1]["accept_given_prefix"]
    assert lines("live-1") == {COLOURS[0]: numbered(shifted), COLOURS[1]: numbered(theirs)}


def test_everything_drawn_is_in_view(axes: dict[str, Axes]) -> None:
    for key, panel in axes.items():
        (left, right), (bottom, top) = panel.get_xlim(), panel.get_ylim()
        assert seen(panel), key
        for line in seen(panel):
            for x, y in points(line):
                assert left <= x <= right, key
                assert y is None or bottom <= y <= top, key


def test_marks_have_room_above(runs: list[Path], tmp_path: Path) -> None:
    run = copy_run(runs[0], tmp_path / "flat")
    log, held_out = log_of(run)
    lines = [{**line, "tau": 1.001} for line in log]
    held = [{"step": line["step"], "held_out": {**line, "tau": 1.5}} for line in held_out]
    write_log(run, lines + held)
    panel = drawn(run)["training-tau"]
    bottom, top = panel.get_ylim()
    assert bottom == 1
    assert (top - 1.5) / (top - bottom) * panel.bbox.height >= 3.5  # half a mark, in points
    (marks,) = (line for line in seen(panel) if line.get_linestyle() == "None")
    assert not marks.get_clip_on()


def test_thinning_keeps_spikes_and_gaps(runs: list[Path], tmp_path: Path) -> None:
    count = 20 * MOST_POINTS
    values = [1.0 + (step % 7) / 100 for step in range(count)]
    values[3333], values[6001], values[7777] = 9.0, -9.0, math.nan
    steps, kept = thinned(list(range(count)), values)
    assert len(kept) <= MOST_POINTS
    assert (steps[0], steps[-1]) == (0, count - 1)
    assert steps == sorted(set(steps))
    assert all(math.isnan(value) or values[step] == value for step, value in zip(steps, kept, strict=True))
    assert {3333, 6001, 7777} <= set(steps)
    few = ([1, 2, 3], [1.0, 2.0, 3.0])
    assert thinned(*few) == few
    for keep in (math.nan, 2.0):
        assert len(thinned(list(range(count)), [keep] * count)[1]) <= MOST_POINTS
    run = copy_run(runs[1], tmp_path / "long")
    first = log_of(run)[0][0]
    named = ("loss", "tau", "tokens_per_s")
    write_log(run, [{**first, "step": k, **dict.fromkeys(named, v)} for k, v in enumerate(values, 1)])
    axes = drawn(run)
    for name in ("training-loss", "training-tau"):
        (line,) = seen(axes[name])
        assert {9.0, -9.0, None} <= {y for _, y in points(line)}
        bottom, top = axes[name].get_ylim()
        assert bottom <= -9
        assert top >= 9
    assert axes["cost-tokens_per_s"].get_ylim()[1] >= 9


@pytest.mark.parametrize("count", [MOST_MARKS, MOST_MARKS + 1, 20_000])
def test_many_evaluations_stay_small(runs: list[Path], tmp_path: Path, count: int) -> None:
    run = copy_run(runs[0], tmp_path / "often")
    log, held_out = log_of(run)
    lines = [{**held_out[0], "step": step, "loss": 2 + step % 5} for step in range(1, count + 1)]
    lines[count // 2]["loss"] = 77.0
    write_log(run, log + [{"step": line["step"], "held_out": line} for line in lines])
    assert len(report(run, out=tmp_path / "report.html").html) < 1_000_000
    panel = drawn(run)["training-loss"]
    data = by_label(panel)["held out"]
    assert len(data) <= MOST_POINTS
    assert (count // 2 + 1, 77.0) in data
    line = seen(panel)[1]
    if count > MOST_MARKS:
        assert line.get_linestyle() == "-"
        assert line.get_linewidth() < 1
        assert line.get_markevery() == []
        assert line.get_color() not in COLOURS
    else:
        assert data == steps_of(lines, "loss")
        assert line.get_linestyle() == "None"


def test_every_temperature_looks_different(runs: list[Path], tmp_path: Path) -> None:
    run = copy_run(runs[0], tmp_path / "warm")
    key = "accept_given_prefix"
    add_speculation(run, (0.5, 1.0))
    cool, warm = figures_of(run, "speculation.json")["runs"]
    found = by_label(drawn(run)["live-0_5-1"])
    assert found == {"temperature 0.5": numbered(cool[key]), "temperature 1": numbered(warm[key])}
    add_speculation(run, (0.0, 0.3, 0.7, 1.0))
    rows = figures_of(run, "speculation.json")["runs"]
    found = by_label(drawn(run)["live-0-0_3-0_7-1"])
    assert list(found) == ["greedy", "T 0.3", "T 0.7", "T 1"]
    assert list(found.values()) == [numbered(row[key]) for row in rows]
    add_speculation(run, (0.0, 0.25, 0.5, 0.75, 1.0))
    page = report(run, out=tmp_path / "report.html")
    check_whole(page)
    live = [key for key in page.labels() if key.startswith("live")]
    assert live == ["live-0", "live-0_25", "live-0_5", "live-0_75", "live-1"]
    assert page.column("Live decoding", "temperature") == ["0", "0.25", "0.5", "0.75", "1"]
    told = [title for title in page.tables["Main figures"][0] if title.startswith("live")]
    assert [title.replace("\N{NO-BREAK SPACE}", " ") for title in told] == [
        "live tokens, greedy",
        "live tokens, T = 1",
    ]
    assert len({page.labels()[key] for key in live}) == 5


def test_many_runs_look_different() -> None:
    looks = [look(i) for i in range(4 * len(COLOURS))]
    told = {(own["color"], own["marker"], str(own["linestyle"])) for own in looks}
    assert len(told) == len(looks)
    assert len({own["marker"] for own in looks[: len(COLOURS)]}) == len(COLOURS)  # also without colour


def test_drawing_leaves_the_library_as_it_was(runs: list[Path], tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    report(runs[1], out=tmp_path / "report.html")
    assert dict(matplotlib.rcParams) == before


def test_speed_up_by_drafted_tokens(axes: dict[str, Axes], runs: list[Path], tmp_path: Path) -> None:
    """A curve per temperature with a gap where nothing was measured; the recommended length has a mark."""
    for temperature, key in ((0, "lengths-0"), (1, "lengths-1")):
        curve, mark, plain = axes[key].get_lines()
        written = figures_of(runs[0], "speculation.json")["runs"][temperature]["lengths"]
        assert points(curve) == [(row["length"], row["speedup"]) for row in written["rows"]] != []
        assert points(mark) == [(1, written["rows"][0]["speedup"])]
        assert set(plain.get_ydata()) == {1}
        assert axes[key].get_ylim()[0] == 0
    other = copy_run(runs[0], tmp_path / "other")

    def slower(figures: dict[str, Any]) -> None:
        for run in figures["runs"]:
            run["lengths"]["num_speculative_tokens"] = 0
            for row in run["lengths"]["rows"]:
                row["speedup"] = 0.25

    change_figures(other, "speculation.json", slower)
    _, _, second, _ = drawn(runs[0], other)["lengths-0"].get_lines()
    assert [y for _, y in points(second)] == [0.25] * 3
    text = report(runs[0], other, out=tmp_path / "two.html").text
    assert "Recommended num_speculative_tokens" in text
    assert "Not here yet: Speed-up by drafted tokens" not in text


def test_a_missing_speed_up_is_named_with_its_command(runs: list[Path], tmp_path: Path) -> None:
    other = copy_run(runs[0], tmp_path / "other")
    change_figures(other, "speculation.json", lambda figures: [run.pop("lengths") for run in figures["runs"]])
    assert not [key for key in drawn(other) if key.startswith("lengths")]
    page = report(other, out=tmp_path / "one.html")
    check_whole(page)
    assert "Not here yet: Speed-up by drafted tokens of other" in page.text
    assert f"dspark speculate --measure --target TARGET --cache CACHE --run {other}" in page.text
