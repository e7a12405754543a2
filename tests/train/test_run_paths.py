"""Paths that commands print, such as RUN/latest, wherever a run is expected; runs that nobody may write."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.conftest import assert_refused, run_cli, run_ok
from tests.machine import obeying_permissions
from tests.train.runs import progress_of, train_arguments
from train.runs.find import NamedRun, find_run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    """A run with checkpoints at steps 2, 4 and 6."""
    run = tmp_path_factory.mktemp("runs") / "a"
    settings = {"train__checkpoint_every": 2, "train__keep_checkpoints": 9, "train__eval_every": 2}
    run_ok(*train_arguments(cache_dir, run, train__max_steps=6, **settings))
    return run


@pytest.mark.parametrize(
    ("place", "checkpoint"),
    [
        ("", None),
        ("latest", "latest"),
        ("best", "best"),
        ("checkpoints/step-000004", "step-000004"),
    ],
)
def test_the_run_of_a_path(run_dir: Path, monkeypatch, place: str, checkpoint: str | None) -> None:
    assert find_run(run_dir / place) == NamedRun(run_dir, checkpoint)
    monkeypatch.chdir(run_dir)
    found = find_run(Path(place))
    assert (found.path.resolve(), found.checkpoint) == (run_dir.resolve(), checkpoint)
    monkeypatch.chdir(run_dir / place)
    found = find_run(Path())
    inside = (run_dir / place).resolve().name if checkpoint else None  # a shell's place has no links
    assert (found.path.resolve(), found.checkpoint) == (run_dir.resolve(), inside)


def test_what_is_no_run_is_refused_as_before(tmp_path: Path, run_dir: Path) -> None:
    (tmp_path / "latest").mkdir()
    assert find_run(tmp_path / "latest") == NamedRun(tmp_path / "latest")
    assert_refused(run_cli("compare", tmp_path / "latest"), 1, "no run at")
    missing = run_dir / "checkpoints" / "step-000099"
    assert_refused(run_cli("export", missing, tmp_path / "e", "--to", "hf"), 1, "no finished checkpoint")


@pytest.mark.parametrize(("place", "step"), [("latest", 6), ("checkpoints/step-000002", 2)])
def test_commands_take_a_printed_path(
    tmp_path: Path, cache_dir: Path, target_dir: Path, run_dir: Path, place: str, step: int
) -> None:
    named = run_dir / place
    common = ("--cache", cache_dir, "--run", named, "--anchors", "1", "--device", "cpu")
    assert json.loads(run_ok("evaluate", *common, "--json"))["step"] == step
    assert json.loads(run_ok("calibrate", *common, "--json"))["step"] == step
    asked = ("speculate", "--target", target_dir, "--dtype", "float32", "--device", "cpu", "--run", named)
    few = ("--num-prompts", "1", "--max-new-tokens", "4", "--temperature", "0")
    assert json.loads(run_ok(*asked, "--cache", cache_dir, *few, "--json"))["step"] == step
    assert f"at step {step} for" in run_ok("export", named, tmp_path / "export", "--to", "hf")
    (row,) = json.loads(run_ok("compare", named, "--format", "json"))
    assert (row["run"], row["step"]) == (f"a/{named.name}", step)
    out = tmp_path / "report.html"
    run_ok("report", named, "--out", out)
    assert f"a/{named.name}" in out.read_text()
    started = train_arguments(cache_dir, tmp_path / "r", train__max_steps=1, draft__init_from=named)
    run_ok(*started)


def test_two_checkpoints_of_a_run_side_by_side(run_dir: Path) -> None:
    both = [run_dir / "checkpoints" / f"step-{step:06d}" for step in (2, 4)]
    rows = json.loads(run_ok("compare", *both, run_dir, "--format", "json"))
    assert [row["run"] for row in rows] == ["a/step-000002", "a/step-000004", "a"]
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert [row["tau"] for row in rows[:2]] == [
        progress_of(run_dir, f"checkpoints/{path.name}")["evaluation"]["tau"] for path in both
    ]


def test_a_path_and_another_checkpoint_are_refused(cache_dir: Path, run_dir: Path) -> None:
    command = ("evaluate", "--cache", cache_dir, "--run", run_dir / "latest", "--checkpoint")
    assert_refused(run_cli(*command, "step-000002"), 2, "two checkpoints", "latest", "step-000002")


def test_training_continues_from_the_newest_only(cache_dir: Path, run_dir: Path) -> None:
    settings = {"train__checkpoint_every": 2, "train__keep_checkpoints": 9, "train__eval_every": 2}
    for place in ("latest", "checkpoints/step-000006"):
        arguments = train_arguments(cache_dir, run_dir / place, train__max_steps=6, **settings)
        assert f"run {run_dir}: complete" in run_ok(*arguments)
    arguments = train_arguments(
        cache_dir, run_dir / "checkpoints/step-000002", train__max_steps=6, **settings
    )
    assert_refused(run_cli(*arguments), 2, "not the newest checkpoint", "draft.init_from")


def test_a_run_that_nobody_may_write_is_measured(
    tmp_path: Path, cache_dir: Path, target_dir: Path, run_dir: Path
) -> None:
    """Figures are printed as ever, a line says that they were not kept, and the exit code is 0."""
    run = shutil.copytree(run_dir, tmp_path / "run", symlinks=True)
    for name in ("evaluation", "calibration", "speculation"):
        (run / "best").resolve().joinpath(f"{name}.json").unlink(missing_ok=True)
    common = ("--cache", cache_dir, "--run", run, "--json")
    asked = ("--target", target_dir, "--dtype", "float32", "--num-prompts", "1", "--max-new-tokens", "4")
    commands = [
        ("evaluate", *common, "--anchors", "1", "--device", "cpu"),
        ("calibrate", *common, "--anchors", "1", "--device", "cpu"),
        ("speculate", *common, *asked, "--device", "cpu"),
    ]
    folders = [path for path in (run, *run.rglob("*")) if path.is_dir() and not path.is_symlink()]
    before = sorted(run.rglob("*"))
    for folder in folders:
        folder.chmod(0o555)
    try:
        with obeying_permissions():
            results = [run_cli(*command) for command in commands]
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert sorted(run.rglob("*")) == before
    for result in results:
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout)["step"] == progress_of(run, "best")["step"]
        (line,) = [text for text in result.stderr.splitlines() if text.startswith("warning: ")]
        assert "printed only" in line
        assert "Permission denied" in line


def test_figures_lost_to_a_full_disk_are_an_error(cache_dir: Path, run_dir: Path, monkeypatch) -> None:
    from pipeline import files

    def full(*_given, **_options):
        raise files.write_error("evaluation.json", OSError(28, "No space left")) from OSError(
            28, "No space left"
        )

    monkeypatch.setattr(files, "publish_bytes", full)
    command = ("evaluate", "--cache", cache_dir, "--run", run_dir, "--anchors", "1", "--device", "cpu")
    assert_refused(run_cli(*command), 1, "No space left")
