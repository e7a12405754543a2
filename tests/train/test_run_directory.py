"""A run's directory after whatever may have happened to it: killed at any change, copied, edited."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.errors import ConfigError
from tests.conftest import assert_refused, run_cli, run_ok
from tests.processes import Dspark
from tests.train.runs import checkpoint_names, lines_of, progress_of, train_arguments, weights_of
from tests.train.test_resume import assert_same_run, one_thread_until_death
from train.config import TrainConfig
from train.draft.dspark.settings import DSparkLoss
from train.runs.names import BEST, LATEST
from train.trainer import trainer as loop

SHORT = {
    "train__max_steps": 4,
    "train__checkpoint_every": 2,
    "train__eval_every": 2,
    "train__keep_checkpoints": 1,
    "train__log_every": 1,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    run_ok(*train_arguments(cache_dir, run, **SHORT))
    return run


def killed(folder: Path, at: int, *arguments: str | Path) -> bool:
    """Run a command until right before its `at`-th change to the disk; False if it had fewer."""
    process = Dspark(folder, *arguments, before=one_thread_until_death, DIE_AT=str(at))
    code = process.wait()
    assert code in (0, -signal.SIGKILL), process.err
    return code != 0


def test_killed_before_every_change_to_the_disk(tmp_path: Path, cache_dir: Path, whole: Path) -> None:
    """From the first file on: the same command always ends in the same run, with links that are right."""
    at = 1
    while True:
        run = tmp_path / f"run{at}"
        arguments = train_arguments(cache_dir, run, **SHORT)
        if not killed(tmp_path / "out", at, *arguments):
            break
        run_ok(*arguments)
        assert_same_run(run, whole)
        assert (run / LATEST).resolve().name == "step-000004"
        assert not list(run.rglob("*.partial")) + list(run.rglob("*.old"))
        shutil.rmtree(run)
        at += 1
    assert at > 30  # two checkpoints, of a dozen changes each


def test_killed_before_every_change_of_a_fresh_start(tmp_path: Path, cache_dir: Path, whole: Path) -> None:
    """What is left is a run: --fresh works, and so does going on with what is there."""
    at = 1
    while True:
        run = tmp_path / "run"
        shutil.copytree(whole, run, symlinks=True)
        arguments = train_arguments(cache_dir, run, **{**SHORT, "train__max_steps": 1, "train__seed": 5})
        killed(tmp_path / "out", at, *arguments, "--fresh")
        if (run / "checkpoints" / "step-000001").exists():
            break
        if (run / LATEST).exists():  # the old one, whole
            assert progress_of(run)["step"] == 4
        copy = tmp_path / "copy"
        shutil.copytree(run, copy, symlinks=True)
        run_ok(*arguments, "--fresh")
        assert progress_of(run)["step"] == 1
        config = copy / "config.toml"
        if config.exists() and "seed = 0" in config.read_text():
            run_ok(*train_arguments(cache_dir, copy, **SHORT))
            assert_same_run(copy, whole)
        shutil.rmtree(run)
        shutil.rmtree(copy)
        at += 1
    assert at > 10


def test_a_checkpoint_that_is_written_again_is_never_missing(
    tmp_path: Path, cache_dir: Path, whole: Path, monkeypatch
) -> None:
    """Stopped within an evaluation, a run saves that step twice; here it is the only checkpoint kept."""
    stopped = tmp_path / "stopped"
    real, calls = loop.validate, []

    def interrupted(*given, **options):
        calls.append(given)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGTERM)
        return real(*given, **options)

    monkeypatch.setattr(loop, "validate", interrupted)
    assert_refused(run_cli(*train_arguments(cache_dir, stopped, **SHORT)), 143, "saved at step 2")
    for at in range(1, 30):
        run = tmp_path / "run"
        shutil.copytree(stopped, run, symlinks=True)
        arguments = train_arguments(cache_dir, run, **SHORT)
        assert killed(tmp_path / "out", at, *arguments)
        saved = (run / LATEST / "training.json").exists()  # not between two renames
        if saved and progress_of(run)["evaluated"] == 2 and not list(run.rglob("*.old")):
            break  # written again, and the old one is gone
        kept = checkpoint_names(run) if (run / "checkpoints").exists() else []
        assert any("step-" in name for name in kept)
        result = run_cli(*arguments)
        assert result.exit_code == 0
        assert "continuing from step" in result.stderr or "complete" in result.stdout
        assert_same_run(run, whole)
        shutil.rmtree(run)
    assert 10 < at < 29


def test_others_may_read_a_draft_as_the_umask_has_it(tmp_path: Path, whole: Path) -> None:
    modes = {path.name: path.stat().st_mode & 0o777 for path in (whole / LATEST).iterdir()}
    (tmp_path / "mine").write_text("")
    assert set(modes.values()) == {(tmp_path / "mine").stat().st_mode & 0o777}, modes


def test_a_copy_without_links_goes_on(tmp_path: Path, cache_dir: Path, whole: Path) -> None:
    """As cloud storage makes one."""
    run, source = tmp_path / "run", tmp_path / "source"
    settings = {**SHORT, "train__keep_checkpoints": 2}
    run_ok(*train_arguments(cache_dir, source, **settings))
    shutil.copytree(source, run)
    shutil.rmtree(run / "checkpoints" / "step-000004")
    assert not (run / LATEST).is_symlink()
    assert "continuing from step 2 of 4" in run_cli(*train_arguments(cache_dir, run, **settings)).stderr
    assert (run / LATEST).is_symlink()
    for name, weight in weights_of(whole).items():
        assert torch.equal(weight, weights_of(run)[name])


def test_what_a_user_keeps_beside_checkpoints_stays(tmp_path: Path, cache_dir: Path) -> None:
    run = tmp_path / "run"
    settings = {**SHORT, "train__eval_every": 0}
    run_ok(*train_arguments(cache_dir, run, **settings))
    shutil.copytree(run / "checkpoints" / "step-000004", run / "checkpoints" / "step-000004-mine")
    shutil.rmtree(run / "checkpoints" / "step-000004")
    run_ok(*train_arguments(cache_dir, run, **settings))
    assert checkpoint_names(run) == ["step-000004", "step-000004-mine"]


def test_fresh_keeps_the_draft_it_starts_from(tmp_path: Path, cache_dir: Path, whole: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run, symlinks=True)
    for source in (run, run / BEST, run / "checkpoints" / "step-000004"):
        result = run_cli(*train_arguments(cache_dir, run, **SHORT, draft__init_from=source), "--fresh")
        assert_refused(result, 2, "init_from", "--fresh clears")
    assert_same_run(run, whole)


def test_a_run_goes_on_without_the_draft_it_started_from(
    tmp_path: Path, cache_dir: Path, whole: Path
) -> None:
    source, run = tmp_path / "source", tmp_path / "run"
    shutil.copytree(whole, source, symlinks=True)
    arguments = train_arguments(cache_dir, run, **SHORT, draft__init_from=source)
    assert killed(tmp_path / "out", 40, *arguments)
    shutil.rmtree(source)
    run_ok(*arguments)
    assert progress_of(run)["complete"]


def test_lost_figures_are_said(tmp_path: Path, cache_dir: Path) -> None:
    run = tmp_path / "run"
    arguments = train_arguments(cache_dir, run, **{**SHORT, "train__keep_checkpoints": 2})
    run_ok(*arguments)
    shutil.rmtree(run / "checkpoints" / "step-000004")
    (run / "metrics.jsonl").unlink()
    result = run_cli(*arguments)
    assert "warning: " in result.stderr
    assert "figures of earlier steps are gone" in result.stderr
    assert [line["step"] for line in lines_of(run) if "loss" in line] == [3, 4]


def test_what_only_looks_left_over_is_not_removed(tmp_path: Path, cache_dir: Path) -> None:
    (tmp_path / "home" / ".thesis.partial").mkdir(parents=True)
    result = run_cli(*train_arguments(cache_dir, tmp_path / "home"))
    assert_refused(result, 1, "is not a run")
    run_ok(*train_arguments(cache_dir, tmp_path / "run", **SHORT))
    (tmp_path / "run" / ".thesis.partial").mkdir()
    run_ok(*train_arguments(cache_dir, tmp_path / "run", **SHORT))
    assert (tmp_path / "run" / ".thesis.partial").is_dir()


def test_an_intact_checkpoint_is_not_called_damaged(
    tmp_path: Path, cache_dir: Path, whole: Path, monkeypatch
) -> None:
    import train.runs.checkpoint

    run = unfinished(tmp_path / "run", whole)

    def refuse(error: Exception):
        def load(*_given):
            raise error

        return load

    monkeypatch.setattr(train.runs.checkpoint, "load_file", refuse(OSError(116, "Stale file handle")))
    result = run_cli(*train_arguments(cache_dir, run, **SHORT))
    assert_refused(result, 1, "can't be read", "Stale file handle")
    assert "remove it" not in result.stderr
    monkeypatch.undo()
    memory = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    monkeypatch.setattr(train.runs.checkpoint, "_load_optimizer", lambda *_a, **_o: refuse(memory)())
    assert_refused(run_cli(*train_arguments(cache_dir, run, **SHORT)), 1, "out of memory")


def test_a_job_that_torchrun_starts_again_is_not_cleared_again(
    tmp_path: Path, cache_dir: Path, whole: Path, monkeypatch
) -> None:
    run = unfinished(tmp_path / "run", whole)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    result = run_cli(*train_arguments(cache_dir, run, **SHORT), "--fresh")
    assert "continuing from step 4 of 4" in result.stderr
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert "continuing" not in run_cli(*train_arguments(cache_dir, run, **SHORT), "--fresh").stderr


def test_asked_to_stop_where_nobody_listens(tmp_path: Path, cache_dir: Path) -> None:
    """Ctrl-C on `dspark train ... | tee log`: tee is gone before there is anything to say."""
    run = tmp_path / "run"
    settings = {"train__max_steps": 100_000, "train__log_every": 1}
    words = [str(word) for word in train_arguments(cache_dir, run, **settings)]
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    deadline = time.monotonic() + 100
    while not (run / "metrics.jsonl").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.stdout.close()
    time.sleep(0.5)  # lines that nobody takes end nothing
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert progress_of(run)["step"] > 0


def test_a_file_in_a_runs_place(tmp_path: Path, cache_dir: Path) -> None:
    (tmp_path / "run").write_text("")
    assert_refused(run_cli(*train_arguments(cache_dir, tmp_path / "run")), 1, "is a file", "--run")


@pytest.mark.parametrize(
    "edit",
    [
        lambda page: page["progress"].update(step="x"),
        lambda page: page.update(progress=list(page["progress"])),
        lambda page: page["progress"].update(window={"sums": 3}),
        lambda page: page["progress"].update(surprise=1),
        lambda page: page["progress"].update(best={"tau": 1.0}),
        lambda page: page.update(machine=3),
        lambda page: page["progress"].pop("total_steps"),
        lambda page: page["config"]["train"].update(lr="fast"),
        lambda page: page.clear(),
    ],
)
def test_an_edited_page_is_one_line(tmp_path: Path, cache_dir: Path, whole: Path, edit) -> None:
    run = unfinished(tmp_path / "run", whole)
    path = (run / LATEST).resolve() / "training.json"
    page = json.loads(path.read_text())
    edit(page)
    path.write_text(json.dumps(page))
    assert_refused(run_cli(*train_arguments(cache_dir, run, **SHORT)), 1, "damaged", "remove it")


def test_a_page_without_its_cache_is_one_line(tmp_path: Path, cache_dir: Path, whole: Path) -> None:
    run = unfinished(tmp_path / "run", whole)
    path = (run / LATEST).resolve() / "training.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "cache": {}}))
    assert_refused(run_cli("evaluate", "--cache", cache_dir, "--run", run), 1, "damaged")


@pytest.mark.parametrize("damage", ["lacks one", "lacks a layer", "shape", "kind", "generator"])
def test_other_states_are_one_line(tmp_path: Path, cache_dir: Path, whole: Path, damage: str) -> None:
    """Not one of them is left out quietly."""
    run = unfinished(tmp_path / "run", whole)
    path = (run / LATEST).resolve() / "training.safetensors"
    states = load_file(path)
    name = "optimizer.layers.0.mlp.up_proj.weight.exp_avg_sq"
    if damage == "lacks one":
        del states[name]
    elif damage == "lacks a layer":
        states = {key: value for key, value in states.items() if "layers.0" not in key}
    elif damage == "shape":
        states[name] = states[name].flatten()
    elif damage == "kind":
        states[name] = states[name].long()
    else:
        states["random.0.cpu"] = states["random.0.cpu"].float()
    save_file(states, path)
    assert_refused(run_cli(*train_arguments(cache_dir, run, **SHORT)), 1, "damaged", "remove it")


def unfinished(run: Path, whole: Path) -> Path:
    """A copy of a complete run that says it is not."""
    shutil.copytree(whole, run, symlinks=True)
    path = (run / LATEST).resolve() / "training.json"
    path.write_text(path.read_text().replace('"complete": true', '"complete": false'))
    return run


def test_a_tau_that_is_no_number_is_not_the_best(tmp_path: Path, cache_dir: Path, monkeypatch) -> None:
    taus = iter([math.nan, 1.1])
    real = loop.validate
    monkeypatch.setattr(loop, "validate", lambda *a, **k: {**real(*a, **k), "tau": next(taus)})
    run_ok(*train_arguments(cache_dir, tmp_path / "r", **SHORT))
    assert progress_of(tmp_path / "r")["best"] == {"step": 4, "tau": 1.1}


def test_stopped_early_between_two_lines(tmp_path: Path, cache_dir: Path, monkeypatch) -> None:
    real = loop.validate
    monkeypatch.setattr(loop, "validate", lambda *a, **k: {**real(*a, **k), "tau": 1.5})
    settings = {"train__eval_every": 2, "train__early_stopping_patience": 1, "train__log_every": 10}
    run_ok(*train_arguments(cache_dir, tmp_path / "r", **settings))
    assert [line["step"] for line in lines_of(tmp_path / "r") if "loss" in line] == [4]


def test_another_machine_is_said(tmp_path: Path, cache_dir: Path, whole: Path) -> None:
    run = unfinished(tmp_path / "run", whole)
    path = (run / LATEST).resolve() / "training.json"
    page = json.loads(path.read_text())
    assert page["machine"]["precision"] == "fp32"
    page["machine"] |= {"precision": "bf16", "device": "NVIDIA H200"}
    page["version"]["torch"] = "2.8.0"
    path.write_text(json.dumps(page))
    said = run_cli(*train_arguments(cache_dir, run, **SHORT)).stderr
    wanted = f"device: NVIDIA H200, now cpu; precision: bf16, now fp32; torch: 2.8.0, now {torch.__version__}"
    assert f"changed since the checkpoint ({wanted}" in said


@pytest.mark.parametrize(
    "values",
    [
        lambda: TrainConfig(lr=math.inf),
        lambda: TrainConfig(lr=math.nan),
        lambda: TrainConfig(seed=10**23),
        lambda: TrainConfig(max_steps=10**20),
        lambda: DSparkLoss(ce_alpha=math.inf),
    ],
)
def test_numbers_that_no_run_can_have(values) -> None:
    with pytest.raises(ConfigError, match=r"finite|at most"):
        values()


def test_a_checkpoint_of_a_newer_version_is_not_damaged(tmp_path: Path, cache_dir: Path, whole: Path) -> None:
    """It may say more of itself: nobody is told to remove it."""
    run = shutil.copytree(whole, tmp_path / "run", symlinks=True)
    path = run / "latest" / "training.json"
    page = json.loads(path.read_text())
    page["config"]["train"]["new_setting"] = 3
    page["cache"]["data"]["new_fact"] = "x"
    page["machine"]["new_machine"] = "y"
    page["newer"] = {"at": "all"}
    path.write_text(json.dumps(page))
    assert "draft of" in run_ok("export", run, tmp_path / "export", "--to", "hf", "--checkpoint", "latest")
    assert "loss" in run_ok(
        "evaluate", "--cache", cache_dir, "--run", run, "--checkpoint", "latest", "--device", "cpu"
    )
