"""`dspark report`: its numbers are those of the files, the page is whole by itself, odd runs do no harm."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pipeline.text import duration, size
from tests.conftest import assert_refused, run_cli, run_ok
from tests.train.reports import (
    Page,
    Points,
    add_speculation,
    by_label,
    change_figures,
    check_whole,
    copy_run,
    drawn,
    figures_of,
    log_of,
    make_runs,
    numbered,
    points,
    report,
    seen,
    write_figures,
    write_log,
)
from tests.train.runs import lines_of, progress_of
from train.experiments.report.plots import MOST_MARKS, MOST_POINTS, thinned
from train.experiments.report.svg import COLOURS, look

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def runs(cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return make_runs(cache_dir, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def one(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Page:
    return report(runs[0], out=tmp_path_factory.mktemp("one") / "report.html")


@pytest.fixture(scope="module")
def both(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Page:
    return report(*runs, out=tmp_path_factory.mktemp("both") / "report.html")


@pytest.fixture(scope="module")
def axes(runs: list[Path]) -> dict[str, Axes]:
    """Of each figure of the page about the run that has everything."""
    return drawn(runs[0])


def shown(values: list, places: int = 3) -> str:
    return ", ".join("\N{EN DASH}" if value is None else f"{value:.{places}f}" for value in values)


def test_pages_are_whole(one: Page, both: Page) -> None:
    for page in (one, both):
        check_whole(page)
        assert len(page.labels()) == len(set(page.labels().values()))


@pytest.mark.parametrize(
    "breach",
    [
        "<script>1</script>",
        '<img src="http://example.com/x.png">',
        '<a href="//example.com">x</a>',
        '<p style="background: url(https://example.com/x)">x</p>',
        '<p onclick="x()">x</p>',
        '<p id="summary">x</p>',
        "<h4>x</h4>",
        "<svg><g></svg>",
    ],
)
def test_the_check_sees_what_is_not_whole(one: Page, breach: str) -> None:
    with pytest.raises((AssertionError, ET.ParseError)):
        check_whole(Page(one.html.replace("<footer>", f"{breach}<footer>")))


def test_figures_of_a_run(one: Page, runs: list[Path]) -> None:
    run = runs[0]
    labels = one.labels()
    assert list(labels) == [
        *(f"training-{name}" for name in ("tau", "accept_rate", "loss", "l1_loss", "ce_loss")),
        "training-confidence_loss",
        *("acceptance-accept_by_position", "acceptance-accept_given_prefix", "live-0-1"),
        *("reliability-prefix-0", "reliability-slot-0", "thresholds-0"),
        *("cost-tokens_per_s", "cost-data_wait_percent", "cost-peak_memory_bytes"),
    ]
    log = [line for line in lines_of(run) if "held_out" not in line]
    held_out = [line["held_out"] for line in lines_of(run) if "held_out" in line]
    assert [line["step"] for line in held_out] == [10, 20]
    for name in ("loss", "ce_loss", "l1_loss", "confidence_loss", "tau"):
        assert (
            f"full: training {log[0][name]:.3f} at step 5 to {log[-1][name]:.3f} at step 20; "
            f"held out {held_out[0][name]:.3f} at step 10 to {held_out[1][name]:.3f} at step 20."
        ) in labels[f"training-{name}"]
    evaluation = figures_of(run, "evaluation.json")
    by_position = labels["acceptance-accept_by_position"]
    assert f"sampling: {shown(evaluation['accept_by_position'])}." in by_position
    assert f"greedy: {shown(evaluation['greedy_accept_by_position'])}." in by_position
    assert f"untrained: {shown(evaluation['untrained']['accept_by_position'])}." in by_position
    given = labels["acceptance-accept_given_prefix"]
    assert f"sampling: {shown(evaluation['accept_given_prefix'])}." in given
    live = labels["live-0-1"]
    for kind, told in zip(
        ("greedy", "temperature 1"), figures_of(run, "speculation.json")["runs"], strict=True
    ):
        here, there = shown(told["accept_given_prefix"]), shown(told["offline"]["accept_given_prefix"])
        assert f"{kind}: live {here}; held out {there}." in live
    speeds = [line["tokens_per_s"] for line in log]
    assert f"{min(speeds):,.0f} to {max(speeds):,.0f} in all" in labels["cost-tokens_per_s"]


def test_calibration_before_and_after(one: Page, runs: list[Path]) -> None:
    calibration = figures_of(runs[0], "calibration.json")
    labels = one.labels()
    for kind in ("prefix", "slot"):
        label = labels[f"reliability-{kind}-0"]
        for when in ("before", "after"):
            told = calibration["report"][when][kind]
            bins = [row for row in told["bins"] if row["count"]]
            pairs = ", ".join(f"{row['predicted']:.2f} to {row['actual']:.2f}" for row in bins)
            assert f"{when}: calibration error {told['ece']:.3f}, said to happened {pairs}." in label
            assert f"{when}, ECE {told['ece']:.3f}" in one.html
    header, before, after = one.tables["Confidence"]
    assert header[-1] == "temperatures"
    assert (before[-1], after[-1]) == ("\N{EN DASH}", "1.25, 1.50, 0.75")
    report_of = calibration["report"]
    for row, when in ((before, "before"), (after, "after")):
        figures = [f"{report_of[when][kind]['ece']:.4f}" for kind in ("prefix", "slot")]
        assert [row[1], row[2], row[4]] == [when, *figures]
    for when in ("before", "after"):
        first = calibration["thresholds"][when][0]
        told = f"{when}: at 0 {first['tokens']:.3f} tokens and {first['acceptance']:.3f};"
        assert labels["thresholds-0"].count(told) == 1


def test_tables_of_a_run(one: Page, runs: list[Path]) -> None:
    run = runs[0]
    evaluation, progress = figures_of(run, "evaluation.json"), progress_of(run)
    header, row = one.tables["Main figures"]
    figures = dict(zip(header, row, strict=True))
    figures = {key.replace("\N{NO-BREAK SPACE}", " "): value for key, value in figures.items()}
    assert figures == {
        "run": "full",
        "step": "20",
        "tau": f"{evaluation['tau']:.3f}",
        "greedy tau": f"{evaluation['greedy_tau']:.3f}",
        "untrained tau": f"{evaluation['untrained']['tau']:.3f}",
        "decoding, sampling": f"{evaluation['decoding']['sampling']['tokens_per_round']:.3f}",
        "decoding, greedy": f"{evaluation['decoding']['greedy']['tokens_per_round']:.3f}",
        "live tokens, greedy": "1.750",
        "speed-up, greedy": "1.250",
        "live tokens, T = 1": "1.500",
        "speed-up, T = 1": "2.250",
        "parameters": figures["parameters"],
        "time": duration(progress["seconds"]),
        "tokens/s": f"{progress['tokens'] / progress['seconds']:,.0f}",
    }
    live = one.tables["Live decoding"]
    assert [row[1:4] for row in live[1:]] == [["0", "1.750", "1.688"], ["1", "1.500", "1.438"]]
    assert [row[-1] for row in live[1:]] == ["8", "\N{EN DASH}"]
    for key, title in (("by_source", "source"), ("by_length", "tokens")):
        _, *rows = one.tables[f"Held-out tau by {title}"]
        assert {row[0]: row[4] for row in rows} == {
            name: f"{figures['tau']:.3f}" for name, figures in evaluation[key].items()
        }
    cache = dict(one.tables["Cache"])
    assert cache["on disk"] == size(evaluation["cache"]["bytes"])
    assert cache["bytes a token"] == f"{evaluation['cache']['bytes_per_token']:,.0f}"
    assert cache["codecs"] == "bf16 context features, bf16 last hidden states"
    fidelity = evaluation["cache"]["fidelity"]
    assert len([row for row in one.tables["What encoding cost in fidelity"] if "layer" in row[0]]) == 3
    mean = fidelity["proof.teacher_tv_mean"]
    assert (f"{mean:.2g}" if mean < 1e-3 else f"{mean:.4f}") in one.text
    (costs,) = one.tables["Time and memory"][1:]
    peak = max(line["peak_memory_bytes"] for line in lines_of(run) if "held_out" not in line)
    assert size(peak) in costs
    assert f"{progress['tokens']:,}" in costs
    assert ["train.log_every", "5"] in one.tables["train"]
    assert "Settings that differ" not in one.tables
    assert "Not here yet" not in one.text


def test_runs_side_by_side(both: Page, runs: list[Path]) -> None:
    assert both.column("Main figures", "run") == ["full", "bare"]
    tau = progress_of(runs[1])["evaluation"]["tau"]
    assert both.column("Main figures", "tau")[1] == f"{tau:.3f}*"
    assert both.column("Main figures", "greedy tau")[1] == "\N{EN DASH}"
    differing = {row[0]: row[1:] for row in both.tables["Settings that differ"][1:]}
    assert differing == {
        "draft.block_size": ["3", "5"],
        "train.max_steps": ["20", "10"],
        "train.lr": ["0.003", "0.001"],
        "train.eval_every": ["10", "0"],
    }
    tables = [title for title in both.tables if title.startswith("Cache")]
    assert tables == ["Cache"]  # the same for both, so once
    assert "bare" not in both.labels()["acceptance-accept_by_position"].replace("bare: none", "")
    for command in ("evaluate --cache CACHE", "speculate --target TARGET", "calibrate --cache CACHE"):
        assert f"dspark {command}" in both.text
    assert str(runs[1]) in both.text
    assert f"--run {runs[0]}" not in both.text


def test_the_same_files_give_the_same_bytes(runs: list[Path], both: Page, tmp_path: Path) -> None:
    again = report(*runs, out=tmp_path / "again.html")
    assert again.html == both.html
    (tmp_path / "matplotlibrc").write_text("font.size: 20\nlines.linewidth: 9\n")  # the user's own taste
    command = [sys.executable, "-X", "importtime", "-m", "pipeline", "report", *map(str, runs)]
    environment = {"PYTHONHASHSEED": "7", "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [*command, "--out", "other.html"],
        cwd=tmp_path,
        env={**environment, "HOME": str(tmp_path), "TZ": "Pacific/Auckland"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (tmp_path / "other.html").read_text(encoding="utf-8") == both.html
    assert "matplotlib.backends.backend_svg" in result.stderr
    assert "matplotlib.pyplot" not in result.stderr  # which would want a display


def test_a_folder_stands_for_its_runs(runs: list[Path], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "report.html: 2 runs" in run_ok("report", runs[0].parent, "--title", "A & <b>")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert page.column("Main figures", "run") == ["bare", "full"]
    assert "<h1>A &amp; &lt;b&gt;</h1>" in page.html


@pytest.mark.parametrize("name", ["<script>alert('x')<", '"quoted" & $x_1$ \N{SNOWMAN}', "a\nb\x01\udcff"])
def test_names_do_no_harm(runs: list[Path], tmp_path: Path, name: str) -> None:
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        pytest.skip("no file can have this name in this locale")
    paths = [copy_run(runs[0], tmp_path / name), copy_run(runs[0], tmp_path / "other" / name)]
    page = report(*paths, out=tmp_path / "report.html")
    check_whole(page)
    kept = " ".join(name.encode("utf-8", "replace").decode().split())
    first, second = page.column("Main figures", "run")
    assert first.endswith(f"/{kept}")
    assert second == f"other/{kept}"


def test_a_run_that_has_only_begun(runs: list[Path], tmp_path: Path) -> None:
    run = tmp_path / "begun"
    run.mkdir()
    for name in ("config.toml", "run.json"):
        shutil.copy(runs[0] / name, run)
    page = report(run, out=tmp_path / "report.html")
    check_whole(page)
    assert page.labels() == {}
    assert page.tables["Main figures"][1] == ["begun", "not begun"]
    assert f"dspark train --cache CACHE --run {run}" in page.text
    check_whole(report(run, runs[0], out=tmp_path / "report.html"))


def test_logs_that_are_odd(runs: list[Path], tmp_path: Path) -> None:
    run = copy_run(runs[1], tmp_path / "odd")
    log = run / "metrics.jsonl"
    first = log.read_text().splitlines()[0]
    log.write_text(first + '\n{"step": 1')  # at work: half a line
    page = report(run, out=tmp_path / "report.html")
    check_whole(page)
    loss = json.loads(first)["loss"]
    assert f"training {loss:.3f} at step 5." in page.labels()["training-loss"]
    values = json.loads(first)
    lines = [{**values, "step": step, "loss": float("nan") if step == 2 else 1.5} for step in (1, 2, 3)]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = report(run, out=tmp_path / "report.html")
    check_whole(page)
    assert "training 1.500 at step 1 to 1.500 at step 3" in page.labels()["training-loss"]
    assert "gaps are steps without a finite figure" in page.text
    log.write_text("".join(json.dumps({**line, "loss": None}) + "\n" for line in lines))
    assert "training-loss" not in report(run, out=tmp_path / "report.html").labels()
    log.unlink()
    page = report(run, out=tmp_path / "report.html")
    check_whole(page)
    assert not [key for key in page.labels() if key.startswith(("training", "cost"))]


def test_a_long_log_stays_small(runs: list[Path], tmp_path: Path) -> None:
    run = copy_run(runs[1], tmp_path / "long")
    values = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    lines = [{**values, "step": step, "loss": step % 7} for step in range(1, 20 * MOST_POINTS)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = report(run, out=tmp_path / "report.html")
    assert len(page.html) < 500_000
    assert f"at step {20 * MOST_POINTS - 1:,}" in page.labels()["training-loss"]


def test_a_draft_without_confidence_head(runs: list[Path], tmp_path: Path) -> None:
    run = copy_run(runs[0], tmp_path / "headless")
    config = run / "config.toml"
    text = config.read_text().replace("confidence_head = true", "confidence_head = false")
    config.write_text(text.replace("confidence_with_markov = true", "confidence_with_markov = false"))
    (run / "best" / "calibration.json").unlink()
    write_figures(
        run, "evaluation.json", {**figures_of(run, "evaluation.json"), "confidence": None, "thresholds": None}
    )
    page = report(run, out=tmp_path / "report.html")
    check_whole(page)
    assert "No confidence head: headless." in page.text
    assert "dspark calibrate" not in page.text
    assert not [key for key in page.labels() if key.startswith(("reliability", "thresholds"))]


def test_as_trained_where_nobody_calibrated(runs: list[Path], tmp_path: Path) -> None:
    run = copy_run(runs[0], tmp_path / "raw")
    (run / "best" / "calibration.json").unlink()
    page = report(run, out=tmp_path / "report.html")
    ece = figures_of(run, "evaluation.json")["confidence"]["prefix"]["ece"]
    assert f"as trained: calibration error {ece:.3f}" in page.labels()["reliability-prefix-0"]
    assert f"dspark calibrate --cache CACHE --run {run}" in page.text


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
        "tokens a round",
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


def test_expected_decoding_is_told_beside_tau(one: Page, runs: list[Path], tmp_path: Path) -> None:
    decoding = figures_of(runs[0], "evaluation.json")["decoding"]
    for kind in ("sampling", "greedy"):
        tokens = decoding[kind]["tokens_per_round"]
        assert one.column("Main figures", f"decoding, {kind}") == [f"{tokens:.3f}"]
        assert f"; {tokens:.3f} expected of decoding" in one.text
    assert "1.438 expected from held-out texts" in one.text  # of the live run at temperature 1
    assert "A round begins where the last one ended" in one.text
    assert "Live rounds begin where the last one ended, and so yield a bit less than tau." in one.text
    run = copy_run(runs[0], tmp_path / "some")
    change_figures(run, "evaluation.json", lambda told: told.update(decoding=None))
    page = report(run, out=tmp_path / "report.html")
    assert "decoding, sampling" not in page.tables["Main figures"][0]
    assert "expected of decoding" not in page.text


def test_calibration_tells_which_samples_it_is_of(one: Page, runs: list[Path], tmp_path: Path) -> None:
    told = "of the half of the held-out samples that"
    assert one.text.count(told) == 2
    run = copy_run(runs[0], tmp_path / "raw")
    (run / "best" / "calibration.json").unlink()
    assert told not in report(run, out=tmp_path / "report.html").text


def test_an_imported_draft_may_know_the_samples(one: Page, runs: list[Path], tmp_path: Path) -> None:
    assert "may have learned" not in one.text
    run = copy_run(runs[0], tmp_path / "foreign")
    change_figures(run, "training.json", lambda told: told.update(imported={"name": "released"}))
    page = report(run, out=tmp_path / "report.html")
    assert "An imported draft may have learned from these samples where it was trained." in page.text
    assert "Cache that foreign was measured on" in page.tables
    assert "cache behind it" not in page.text
    assert "An imported draft (foreign) may" in report(*runs, run, out=tmp_path / "report.html").text


def test_the_step_is_of_what_was_measured(runs: list[Path], tmp_path: Path) -> None:
    run = copy_run(runs[0], tmp_path / "past")
    later = run / "checkpoints" / "step-000040"
    shutil.copytree(run / "best", later)
    (run / "latest").unlink()
    (run / "latest").symlink_to("checkpoints/step-000040")
    for complete, step in ((True, "best at 20 of 40"), (False, "best at 20, now 40 of 50")):
        training = figures_of(run, "training.json")
        progress = {"step": 40, "total_steps": 50, "tokens": 123_456, "complete": complete}
        training["progress"].update(progress)
        (later / "training.json").write_text(json.dumps(training))
        page = report(run, out=tmp_path / "report.html")
        assert page.column("Main figures", "step") == [step]
        assert page.column("Time and memory", "tokens") == ["123,456"]
        assert page.column("Provenance", "checkpoint") == ["step 20"]


@pytest.mark.parametrize(
    "change", [{"data_sha256": "b" * 64}, {"target_weights": "c" * 64}, {"samples": 7}, {"bytes": 9}]
)
def test_caches_of_one_name_are_told_apart(
    one: Page, runs: list[Path], tmp_path: Path, change: dict[str, Any]
) -> None:
    known = json.loads((runs[0] / "run.json").read_text())["cache"]
    facts = {"data_sha256": known["data"]["sha256"], "target_weights": known["target"]["weights"]}
    whole, other = (copy_run(runs[0], tmp_path / name) for name in ("whole", "other"))
    for run, own in ((whole, facts), (other, {**facts, **change})):
        change_figures(run, "evaluation.json", lambda told, own=own: told["cache"].update(own))
    page = report(whole, other, out=tmp_path / "report.html")
    titles = [title for title in page.tables if title.startswith("Cache")]
    if set(change) & set(facts):
        assert sorted(titles) == ["Cache of whole", "Cache that other was measured on"]
        assert "cache behind it" not in page.text
        assert "for other the one measured on" in page.text
    else:
        assert sorted(titles) == ["Cache of other", "Cache of whole"]
    alone = report(whole, out=tmp_path / "report.html")
    assert "Cache" in alone.tables
    assert "what the cache behind it takes on disk" in alone.text
    assert "what the cache behind it takes on disk" in one.text


HUGE = int("9" * 400)


def test_numbers_that_nobody_can_draw(runs: list[Path], tmp_path: Path) -> None:
    run = copy_run(runs[0], tmp_path / "huge")
    log, held_out = log_of(run)
    for line, loss in zip(log, itertools.cycle((-1e308, 1e308, HUGE, 1e99)), strict=False):
        line.update(loss=loss, tokens_per_s=HUGE)
    write_log(run, log + [{"step": line["step"], "held_out": {**line, "tau": HUGE}} for line in held_out])
    for name in ("evaluation.json", "calibration.json", "speculation.json"):
        change_figures(run, name, lambda told: told.update(dict.fromkeys(list(told)[::2], HUGE)))
    page = report(run, out=tmp_path / "report.html")
    check_whole(page)
    assert "cost-tokens_per_s" not in page.labels()


def test_bins_that_hold_nothing(runs: list[Path], tmp_path: Path) -> None:
    run = copy_run(runs[0], tmp_path / "empty")

    def empty(told: dict[str, Any]) -> None:
        for when in ("before", "after"):
            for part in told["report"][when].values():
                part["bins"] = [{**row, "count": 0, "predicted": 0.5, "actual": 0.5} for row in part["bins"]]

    change_figures(run, "calibration.json", empty)
    check_whole(report(run, out=tmp_path / "report.html"))
    assert not drawn(run)["reliability-slot-0"].patches


def test_nesting_is_refused_in_one_line(runs: list[Path], tmp_path: Path) -> None:
    deep = "[" * 100_000
    for name in ("evaluation.json", "calibration.json", "speculation.json", "training.json"):
        run = copy_run(runs[0], tmp_path / name)
        (run / "best" / name).write_text(deep)
        said = (str(run), "nested too deeply") if name == "training.json" else (name, "can't be read")
        assert_refused(run_cli("report", run, "--out", tmp_path / "x.html"), 1, *said)
    run = copy_run(runs[1], tmp_path / "log")
    (run / "metrics.jsonl").write_text(f'{{"step": 1}}\n{deep}\n')
    assert_refused(run_cli("report", run, "--out", tmp_path / "x.html"), 1, "line 2", "metrics.jsonl")


def test_out_replaces_pages_alone(runs: list[Path], tmp_path: Path) -> None:
    run = copy_run(runs[1], tmp_path / "run")
    config = (run / "config.toml").read_bytes()
    assert_refused(run_cli("report", run, "--out", run / "config.toml"), 2, "config.toml", "no page", ".html")
    assert (run / "config.toml").read_bytes() == config
    link = tmp_path / "link"
    link.symlink_to(run / "nothing")
    assert_refused(run_cli("report", run, "--out", link), 2, "link", "no page")
    for name in ("page.html", "PAGE.HTM", "new"):
        if name != "new":
            (tmp_path / name).write_text("old")
        run_ok("report", run, "--out", tmp_path / name)
        assert (tmp_path / name).read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


ODD = (None, "x", [], [1], {}, float("nan"), {"x": "y"})


@pytest.mark.parametrize("turn", range(4))
def test_figures_may_be_missing_or_odd(runs: list[Path], tmp_path: Path, turn: int) -> None:
    run = copy_run(runs[0], tmp_path / "odd")
    for name in ("evaluation.json", "calibration.json", "speculation.json"):
        figures = figures_of(run, name)
        for i, key in enumerate(figures):
            if (i + turn) % 2:
                figures[key] = ODD[(i + turn) % len(ODD)]
        write_figures(run, name, figures)
    check_whole(report(run, runs[1], out=tmp_path / "report.html"))


@pytest.mark.parametrize("value", ODD)
def test_figures_may_all_be_odd(runs: list[Path], tmp_path: Path, value) -> None:
    run = copy_run(runs[0], tmp_path / "odd")
    for name in ("evaluation.json", "calibration.json", "speculation.json"):
        write_figures(run, name, dict.fromkeys(figures_of(run, name), value))
    check_whole(report(run, out=tmp_path / "report.html"))


def test_different_caches_are_shown_each(runs: list[Path], tmp_path: Path) -> None:
    other = copy_run(runs[0], tmp_path / "other")
    evaluation = figures_of(other, "evaluation.json")
    cache = {**evaluation["cache"], "context_codec": "nf4", "bytes": 123_456_789}
    write_figures(other, "evaluation.json", {**evaluation, "cache": cache})
    page = report(*runs, other, out=tmp_path / "report.html")
    # Not the one it was trained on, for that has other codecs.
    assert dict(page.tables["Cache that other was measured on"])["on disk"] == "123.5 MB"
    assert dict(page.tables["Cache of full, bare"])["on disk"] == size(evaluation["cache"]["bytes"])


def test_many_runs_look_different() -> None:
    looks = [look(i) for i in range(4 * len(COLOURS))]
    told = {(own["color"], own["marker"], str(own["linestyle"])) for own in looks}
    assert len(told) == len(looks)
    assert len({own["marker"] for own in looks[: len(COLOURS)]}) == len(COLOURS)  # also without colour


def test_mistakes_are_one_line(runs: list[Path], tmp_path: Path) -> None:
    assert_refused(run_cli("report", tmp_path / "no"), 1, f"no run at {tmp_path / 'no'}")
    assert_refused(run_cli("report"), 2, "RUN")
    out = tmp_path / "no" / "report.html"
    assert_refused(run_cli("report", runs[1], "--out", out), 1, str(out), "can't be written")
    (tmp_path / "folder").mkdir()
    assert_refused(run_cli("report", runs[1], "--out", tmp_path / "folder"), 1, "can't be written")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    for name in ("evaluation.json", "calibration.json", "speculation.json"):
        run = copy_run(runs[0], tmp_path / name)
        (run / "best" / name).write_text("{")
        assert_refused(run_cli("report", run, "--out", tmp_path / "x.html"), 1, name, "can't be read")
    run = copy_run(runs[1], tmp_path / "log")
    for line in ("x", "[1]", '{"loss": 1}'):
        (run / "metrics.jsonl").write_text(f'{{"step": 1}}\n{line}\n')
        assert_refused(run_cli("report", run, "--out", tmp_path / "x.html"), 1, "line 2", "metrics.jsonl")
    assert not (tmp_path / "x.html").exists()


def test_without_matplotlib_it_says_what_to_install(runs: list[Path], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = run_cli("report", runs[0], "--out", tmp_path / "report.html")
    assert_refused(result, 1, "dspark report needs matplotlib: pip install 'dspark-pipeline[report]'")


def test_help_imports_neither_torch_nor_matplotlib() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "pipeline", "report", "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    modules = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in result.stderr.splitlines()}
    assert "click" in modules
    assert not modules & {"torch", "matplotlib", "numpy", "jinja2"}
    assert "--title" in result.stdout


def test_drawing_leaves_the_library_as_it_was(runs: list[Path], tmp_path: Path) -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    report(runs[1], out=tmp_path / "report.html")
    assert dict(matplotlib.rcParams) == before
