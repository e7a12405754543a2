"""`dspark report` of odd runs: gaps do no harm, and mistakes are one line."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import assert_refused, run_cli, run_ok
from tests.train.reports import (
    Page,
    change_figures,
    check_whole,
    copy_run,
    drawn,
    figures_of,
    log_of,
    report,
    write_figures,
    write_log,
)
from tests.train.runs import progress_of
from train.experiments.report.plots import MOST_POINTS


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
    assert_refused(
        run_cli("report", run, "--out", run / "config.toml"), 2, "config.toml", "not an .html file"
    )
    assert (run / "config.toml").read_bytes() == config
    link = tmp_path / "link"
    link.symlink_to(run / "nothing")
    assert_refused(run_cli("report", run, "--out", link), 2, "link", "not an .html file")
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


def test_what_does_not_fit_is_told_and_left_out(runs: list[Path], tmp_path: Path) -> None:
    run, out = copy_run(runs[0], tmp_path / "odd"), tmp_path / "report.html"
    evaluation = figures_of(run, "evaluation.json")

    def shown(where: str, value: Any) -> tuple[str, Page]:
        write_figures(run, "evaluation.json", {**evaluation, where: value})
        result = run_cli("report", run, "--out", out)
        assert result.exit_code == 0, result.output
        page = Page(out.read_text(encoding="utf-8"))
        check_whole(page)
        return result.stderr, page

    said, page = shown("greedy_tau", "high")
    path = (run / "best").resolve() / "evaluation.json"
    told = "(evaluation.greedy_tau: expected float, got 'high'): remove it, and measure again\n"
    assert said == f"warning: {path} can't be read {told}"
    assert "greedy tau" not in [
        title.replace("\N{NO-BREAK SPACE}", " ") for title in page.tables["Main figures"][0]
    ]
    assert page.column("Main figures", "tau") == [f"{evaluation['tau']:.3f}"]
    said, page = shown("accept_by_position", [0.5, float("nan"), 0.25])
    assert "evaluation.accept_by_position: expected float, got 'NaN'" in said
    assert "sampling: 0.500, \N{EN DASH}, 0.250." in page.labels()["acceptance-accept_by_position"]
    said, page = shown("tau", None)
    assert "evaluation.tau: expected float, got None" in said
    assert page.column("Main figures", "tau") == [f"{progress_of(run)['evaluation']['tau']:.3f}*"]
    assert f"dspark evaluate --cache CACHE --run {run}" in page.text
    said, page = shown("tau", evaluation["tau"])
    assert said == ""
    assert page.column("Main figures", "tau") == [f"{evaluation['tau']:.3f}"]


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
