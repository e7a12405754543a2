"""Drafts of several kinds on one page: at equal tokens, at equal time, in one table."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.text import duration
from tests.conftest import assert_refused, run_cli, run_ok
from tests.train.reports import (
    Page,
    check_whole,
    copy_run,
    drawn,
    figures_of,
    log_of,
    points,
    report,
    seen,
    write_log,
)
from tests.train.runs import lines_of, progress_of, train_arguments
from train.experiments.report.svg import look

NONE = "\N{EN DASH}"


@pytest.fixture(scope="module")
def flash(cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DFlash run of K = 4 that was evaluated."""
    run = tmp_path_factory.mktemp("kinds") / "flash"
    own = {"draft__kind": "dflash", "draft__block_size": 5, "draft__markov_rank": None}
    run_ok(*train_arguments(cache_dir, run, **own, train__eval_every=10))
    run_ok("evaluate", "--cache", cache_dir, "--run", run, "--device", "cpu")
    return run


@pytest.fixture(scope="module")
def page(runs: list[Path], flash: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return report(runs[0], flash, out=tmp_path_factory.mktemp("page") / "report.html")


def test_evaluations_log_what_training_took(flash: Path) -> None:
    first, last = (line for line in lines_of(flash) if "held_out" in line)
    progress = progress_of(flash)
    assert (last["tokens"], last["seconds"]) == (progress["tokens"], progress["seconds"])
    assert 0 < first["tokens"] < last["tokens"]
    assert 0 < first["seconds"] < last["seconds"]


def test_tau_is_drawn_at_equal_tokens_and_time(runs: list[Path], flash: Path, page: Page) -> None:
    axes = drawn(runs[0], flash)
    for cost in ("tokens", "seconds"):
        for number, (run, line) in enumerate(zip((runs[0], flash), seen(axes[f"kinds-{cost}"]), strict=True)):
            told = [each for each in lines_of(run) if "held_out" in each]
            assert len(told) == 2
            assert points(line) == [(each[cost], each["held_out"]["tau"]) for each in told]
            own = look(number)  # also without colour
            assert (line.get_marker(), line.get_color()) == (own["marker"], own["color"])
        assert axes[f"kinds-{cost}"].get_ylim()[0] <= 1
    label = page.labels()["kinds-tokens"]
    last = lines_of(flash)[-1]
    assert "full (DSpark, K = 3): " in label
    assert label.endswith(f"{last['held_out']['tau']:.3f} after {last['tokens']:,} tokens.")
    assert page.labels()["kinds-seconds"].endswith(f" after {duration(last['seconds'])}.")
    assert [key for key in page.labels() if key.startswith("kinds")] == ["kinds-tokens", "kinds-seconds"]


def test_the_table_has_what_kinds_are_compared_by(flash: Path, page: Page) -> None:
    check_whole(page)
    evaluation, progress = figures_of(flash, "evaluation.json"), progress_of(flash)
    header, _, row = page.tables["Main figures"]
    told = dict(zip((title.replace("\N{NO-BREAK SPACE}", " ") for title in header), row, strict=True))
    parameters, _ = told.pop("parameters"), told.pop("step")
    assert told == {
        "run": "flash",
        "kind": "DFlash",
        "K": "4",
        "tau": f"{evaluation['tau']:.3f}",
        "greedy tau": f"{evaluation['greedy_tau']:.3f}",
        "decoding, sampling": f"{evaluation['decoding']['sampling']['tokens_per_round']:.3f}",
        "decoding, greedy": f"{evaluation['decoding']['greedy']['tokens_per_round']:.3f}",
        "live tokens, greedy": NONE,
        "speed-up, greedy": NONE,
        "live tokens, T = 1": NONE,
        "speed-up, T = 1": NONE,
        "tokens": f"{progress['tokens']:,}",
        "time": duration(progress["seconds"]),
    }
    assert parameters
    assert page.column("Main figures", "kind") == ["DSpark", "DFlash"]
    assert page.column("Main figures", "K") == ["3", "4"]
    assert "DSpark, DFlash \N{MIDDLE DOT} 2 runs" in " ".join(page.text.split())
    assert "flash (DFlash, K = 4)" in " ".join(page.text.split())


def test_kinds_are_measured_at_the_same_anchors(runs: list[Path], flash: Path) -> None:
    """Anchors do not depend on K, so that figures of several kinds are about the same blocks."""
    ours, theirs = (figures_of(run, "evaluation.json") for run in (runs[0], flash))
    assert (len(ours["accept_by_position"]), len(theirs["accept_by_position"])) == (3, 4)
    for key in ("samples", "blocks"):
        assert ours[key] == theirs[key]
    for key in ("by_source", "by_length", "by_context"):
        told = [{name: row["blocks"] for name, row in each[key].items()} for each in (ours, theirs)]
        assert told[0] == told[1]


def test_what_a_kind_lacks_is_a_dash(page: Page, flash: Path) -> None:
    differing = {row[0]: row[1:] for row in page.tables["Settings that differ"][1:]}
    assert differing["draft.markov_head"] == ["vanilla", NONE]
    assert differing["loss.slot_weights"] == [NONE, "decay"]
    assert ["loss.confidence_alpha", "1.0", NONE] in page.tables["loss"]
    assert ["draft.sliding_window", "none", "none"] in page.tables["draft"]  # which both have
    assert "flash: none" in page.labels()["training-confidence_loss"]
    assert page.labels()["acceptance-accept_by_position"].count(", ") > 3
    assert "No confidence head: flash." in page.text
    assert [key for key in page.labels() if key.startswith(("reliability", "thresholds"))] == [
        "reliability-prefix-0",
        "reliability-slot-0",
        "thresholds-0",
    ]
    assert "calibrate" not in page.text
    assert "Kinds of draft minimise different sums." in page.text


def test_a_kind_without_a_confidence_head_has_no_figures_of_one(
    flash: Path, cache_dir: Path, tmp_path: Path
) -> None:
    evaluation = figures_of(flash, "evaluation.json")
    assert evaluation["confidence_loss"] is evaluation["confidence"] is evaluation["thresholds"] is None
    shown = run_ok("evaluate", "--cache", cache_dir, "--run", flash, "--device", "cpu")
    assert "confidence" not in shown
    parts = [f"loss {evaluation['loss']:.4f}", f"cross entropy {evaluation['ce_loss']:.4f}"]
    assert shown.splitlines()[1] == f"  {', '.join(parts)}, L1 {evaluation['l1_loss']:.4f}"
    result = run_cli("calibrate", "--cache", cache_dir, "--run", flash, "--device", "cpu")
    assert_refused(result, 1, "no confidence head to calibrate: DFlash drafts have none")
    alone = report(flash, out=tmp_path / "report.html")
    assert "training-confidence_loss" not in alone.labels()
    assert "kinds-tokens" not in alone.labels()  # the curve over steps says it


def test_a_draft_that_nobody_evaluated_has_trainings_own_figures_on_its_card(
    flash: Path, tmp_path: Path
) -> None:
    run = copy_run(flash, tmp_path / "raw")
    (run / "best" / "evaluation.json").unlink()
    run_ok("export", run, tmp_path / "export", "--to", "hf")
    card = (tmp_path / "export" / "README.md").read_text()
    assert f"{progress_of(run, 'best')['evaluation']['tau']:.3f} when sampling" in card


def test_of_an_older_log_the_last_evaluation_is_drawn(flash: Path, tmp_path: Path) -> None:
    old, bare = (copy_run(flash, tmp_path / name) for name in ("old", "bare"))
    log, held_out = log_of(flash)
    write_log(old, log + [{"step": line["step"], "held_out": line} for line in held_out])
    write_log(bare, log)
    progress, axes = progress_of(flash), drawn(old, bare)
    for cost in ("tokens", "seconds"):
        (line,) = seen(axes[f"kinds-{cost}"])
        assert points(line) == [(progress[cost], held_out[-1]["tau"])]
