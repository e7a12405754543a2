"""`dspark report`: its numbers are those of the files, and the page is whole by itself."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

from pipeline.text import duration, size
from tests.conftest import run_ok
from tests.train.reports import (
    Page,
    change_figures,
    check_whole,
    copy_run,
    figures_of,
    report,
    write_figures,
)
from tests.train.runs import lines_of, progress_of

ROOT = Path(__file__).parents[3]


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
        "acceptance-accept_by_position",
        "acceptance-accept_given_prefix",
        "live-0-1",
        "reliability-prefix-0",
        "reliability-slot-0",
        "thresholds-0",
        "lengths-0",
        "lengths-1",
        "cost-tokens_per_s",
        "cost-data_wait_percent",
        "cost-peak_memory_bytes",
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
            assert f"{when}: calibration error {told['ece']:.3f}, predicted to observed {pairs}." in label
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
    titles = {"by_source": "source", "by_length": "tokens", "by_context": "tokens of context"}
    for key, title in titles.items():
        _, *rows = one.tables[f"Held-out tau by {title}"]
        assert {row[0]: row[4] for row in rows} == {
            name: f"{figures['tau']:.3f}" for name, figures in evaluation[key].items()
        }
    cache = dict(one.tables["Cache"])
    assert cache["on disk"] == size(evaluation["cache"]["bytes"])
    assert cache["bytes per token"] == f"{evaluation['cache']['bytes_per_token']:,.0f}"
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
    assert "its cache takes" not in page.text
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
        assert "its cache takes" not in page.text
        assert "for other the one measured on" in page.text
    else:
        assert sorted(titles) == ["Cache of other", "Cache of whole"]
    alone = report(whole, out=tmp_path / "report.html")
    assert "Cache" in alone.tables
    assert "what its cache takes on disk" in alone.text
    assert "what its cache takes on disk" in one.text


def test_different_caches_are_shown_each(runs: list[Path], tmp_path: Path) -> None:
    other = copy_run(runs[0], tmp_path / "other")
    evaluation = figures_of(other, "evaluation.json")
    cache = {**evaluation["cache"], "context_codec": "nf4", "bytes": 123_456_789}
    write_figures(other, "evaluation.json", {**evaluation, "cache": cache})
    page = report(*runs, other, out=tmp_path / "report.html")
    # Not the one it was trained on, for that has other codecs.
    assert dict(page.tables["Cache that other was measured on"])["on disk"] == "123.5 MB"
    assert dict(page.tables["Cache of full, bare"])["on disk"] == size(evaluation["cache"]["bytes"])


def test_help_imports_neither_torch_nor_matplotlib() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "pipeline", "report", "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    modules = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in result.stderr.splitlines()}
    assert "click" in modules
    assert not modules & {"torch", "matplotlib", "numpy", "jinja2"}
    assert "--title" in result.stdout
