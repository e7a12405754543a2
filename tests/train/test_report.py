"""`dspark report`: its numbers are those of the files, the page is whole by itself, odd runs do no harm."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from pipeline.units import duration, size
from tests.conftest import assert_refused, run_cli, run_ok
from tests.train.reports import Page, check_whole, copy_run, figures_of, make_runs, report, write_figures
from tests.train.runs import lines_of, progress_of
from train.report.plots import MOST_POINTS
from train.report.svg import COLOURS, look

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
    for kind in ("greedy", "temperature 1"):
        told = f"{kind}: live {shown([0.5125, 0.2575, None])}; held out {shown([0.5, 0.25, 0.125])}."
        assert told in live
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
    first = calibration["thresholds"]["after"][0]
    told = f"at 0 {first['tokens']:.3f} tokens and {first['acceptance']:.3f}"
    assert labels["thresholds-0"].count(told) == 2


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
        "live tokens, greedy": "1.750",
        "speed-up, greedy": "1.250",
        "live tokens, T = 1": "1.750",
        "speed-up, T = 1": "2.250",
        "parameters": figures["parameters"],
        "time": duration(progress["seconds"]),
        "tokens/s": f"{progress['tokens'] / progress['seconds']:,.0f}",
    }
    live = one.tables["Live decoding"]
    assert [row[1:4] for row in live[1:]] == [["0.0", "1.750", "1.688"], ["1.0", "1.750", "1.688"]]
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
    assert (tmp_path / "other.html").read_text() == both.html
    assert "matplotlib.backends.backend_svg" in result.stderr
    assert "matplotlib.pyplot" not in result.stderr  # which would want a display


def test_a_folder_stands_for_its_runs(runs: list[Path], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "report.html: 2 runs" in run_ok("report", runs[0].parent, "--title", "A & <b>")
    page = Page((tmp_path / "report.html").read_text())
    assert page.column("Main figures", "run") == ["bare", "full"]
    assert "<h1>A &amp; &lt;b&gt;</h1>" in page.html


@pytest.mark.parametrize("name", ["<script>alert('x')<", '"quoted" & $x_1$ \N{SNOWMAN}', "a\nb\x01\udcff"])
def test_names_do_no_harm(runs: list[Path], tmp_path: Path, name: str) -> None:
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
    assert dict(page.tables["Cache of other"])["on disk"] == "123.5 MB"
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
