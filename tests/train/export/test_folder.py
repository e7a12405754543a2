"""The folder that `dspark export` writes: whole or not at all, and of which checkpoint."""

from __future__ import annotations

import json
import math
import os
import stat
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import assert_refused, capture_arguments, run_cli, run_ok
from tests.tiny import make_target
from tests.train.exports import change_json, changed
from tests.train.runs import train_arguments, weights_of


def test_any_checkpoint(tmp_path: Path, cache_dir: Path) -> None:
    run = tmp_path / "run"
    run_ok(*train_arguments(cache_dir, run, train__max_steps=4, train__checkpoint_every=2))
    for checkpoint in ("step-000002", "latest"):
        run_ok(
            "export",
            run,
            tmp_path / checkpoint,
            "--to",
            "hf",
            "--dtype",
            "float32",
            "--checkpoint",
            checkpoint,
        )
        folder = run / ("latest" if checkpoint == "latest" else f"checkpoints/{checkpoint}")
        got, wanted = (load_file(f / "model.safetensors") for f in (tmp_path / checkpoint, folder))
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    missing = run_cli("export", run, tmp_path / "no", "--to", "hf", "--checkpoint", "step-000009")
    assert_refused(missing, 1, "no finished checkpoint", "step-000002")


@pytest.mark.parametrize("failing", ["save_file", "rename"])
def test_nothing_is_left_of_an_export_that_fails(
    tmp_path: Path, run_dir: Path, monkeypatch, failing: str
) -> None:
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    where = "pathlib.Path.rename" if failing == "rename" else f"train.export.writer.{failing}"
    with monkeypatch.context() as patch:
        patch.setattr(where, full)
        result = run_cli("export", run_dir, tmp_path / "out", "--to", "hf")
    assert_refused(result, 1, "No space left on device")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".out.partial").mkdir()  # of a process that was killed
    (tmp_path / ".out.partial" / "old").write_text("")
    run_ok("export", run_dir, tmp_path / "out", "--to", "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "old").exists()


def test_a_directory_with_something_in_it_stays_as_it_is(tmp_path: Path, run_dir: Path) -> None:
    out = tmp_path / "deep" / "out"
    run_ok("export", run_dir, out, "--to", "hf")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert_refused(run_cli("export", run_dir, out, "--to", "hf"), 2, "out is not empty", "choose another")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (tmp_path / "file").write_text("")
    assert_refused(run_cli("export", run_dir, tmp_path / "file", "--to", "hf"), 2, "is a file")
    long = run_cli("export", run_dir, tmp_path / ("x" * 300), "--to", "hf")
    assert_refused(long, 1, "can't be written")
    (tmp_path / "empty").mkdir()
    run_ok("export", run_dir, tmp_path / "empty", "--to", "hf")
    assert (tmp_path / "empty" / "config.json").is_file()


def test_an_empty_directory_is_filled(tmp_path: Path, run_dir: Path, monkeypatch) -> None:
    """It stays the one it was, for whoever is in it, and config.json comes last."""
    out = tmp_path / "out"
    out.mkdir(mode=0o750)
    before, order = out.stat(), []
    rename = Path.rename

    def recorded(path: Path, target: Path) -> Path:
        order.append(Path(target).name)
        return rename(path, target)

    def full(path: Path, target: Path) -> Path:
        if path.name == "config.json" and path.parent.name == ".partial":
            raise OSError(28, "No space left on device")
        return rename(path, target)

    monkeypatch.chdir(out)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", full)
        assert_refused(run_cli("export", run_dir, ".", "--to", "hf"), 1, "No space left on device")
    assert list(out.iterdir()) == []
    (out / ".partial").mkdir()  # of a process that was killed
    monkeypatch.setattr(Path, "rename", recorded)
    run_ok("export", run_dir, ".", "--to", "hf")
    assert {path.name for path in Path.cwd().iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert (out.stat().st_ino, out.stat().st_mode) == (before.st_ino, before.st_mode)
    assert order[-1] == "config.json"
    assert list(tmp_path.iterdir()) == [out]


def test_odd_directories(tmp_path: Path, run_dir: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert_refused(run_cli("export", run_dir, tmp_path / "loop", "--to", "hf"), 1, "can't be written")
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    shown = b"\xff".decode(sys.getfilesystemencoding(), "replace")  # no character in UTF-8
    assert f"{shown}: the draft of" in run_ok("export", run_dir, odd, "--to", "hf")
    assert (odd / "config.json").is_file()


def test_others_may_read_it_as_far_as_the_umask_lets_them(tmp_path: Path, run_dir: Path) -> None:
    for umask in (0o022, 0o077):
        before = os.umask(umask)
        try:
            run_ok("export", run_dir, tmp_path / oct(umask), "--to", "hf")
        finally:
            os.umask(before)
        for path in (tmp_path / oct(umask)).iterdir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path


def test_what_goes_together_and_what_does_not(
    tmp_path: Path, run_dir: Path, cache_dir: Path, data_file: Path
) -> None:
    out = tmp_path / "out"
    assert_refused(run_cli("export", run_dir, out), 2, "--to")
    assert_refused(run_cli("export", run_dir, out, "--to", "tgi"), 2, "tgi")
    assert_refused(run_cli("export", run_dir, out, "--to", "hf", "--with-embeddings"), 2, "needs --cache")
    assert_refused(
        run_cli("export", run_dir, out, "--to", "hf", "--cache", cache_dir), 2, "--with-embeddings"
    )
    assert_refused(
        run_cli("export", tmp_path / "no", out, "--to", "hf"), 1, "no finished checkpoint", "dspark train"
    )
    run_ok(*capture_arguments(make_target(tmp_path / "other", seed=9), data_file, tmp_path / "cache"))
    embeddings = ["--with-embeddings", "--cache", tmp_path / "cache"]
    other = run_cli("export", run_dir, out, "--to", "hf", *embeddings)
    assert_refused(other, 1, "was trained for target tiny-llama", "with other weights")
    assert not out.exists()


def test_damaged_checkpoints_are_one_line(tmp_path: Path, run_dir: Path) -> None:
    def refused(run: Path, code: int, *parts: str) -> None:
        assert_refused(
            run_cli("export", run, tmp_path / "out", "--to", "hf", "--dtype", "float16"), code, *parts
        )
        assert not (tmp_path / "out").exists()

    refused(changed(run_dir, tmp_path / "a", markov_rank=4), 1, "other tensors than config.json describes")
    refused(changed(run_dir, tmp_path / "b", mask_token_id=None), 1, "is damaged", "mask_token_id")
    run = changed(run_dir, tmp_path / "c")
    (run / "latest" / "config.json").write_text("{")
    refused(run, 1, "is damaged")
    for name, value, code, part in (
        ("d", 1e5, 2, "float16 can't hold"),
        ("e", float("nan"), 1, "not finite"),
    ):
        run = changed(run_dir, tmp_path / name)
        weights = weights_of(run)
        weights["fc.weight"][0, 0] = value
        save_file(weights, run / "latest" / "model.safetensors")
        refused(run, code, "fc.weight", part)
    for number, temperatures in enumerate(
        ([1.0, 1.0], [1.0, 0.0, 1.0], "hot", [1.0, True, 1.0], [1, math.nan, 1], None)
    ):
        run = changed(run_dir, tmp_path / f"t{number}")
        (run / "latest" / "calibration.json").write_text(json.dumps({"temperatures": temperatures}))
        refused(run, 1, "calibration.json", "3 positive temperatures", "dspark calibrate")
    for number, text in enumerate(("{", '{"accept_by_position": 3, "tau": 1.0}', '{"tau": 1.0}')):
        run = changed(run_dir, tmp_path / f"f{number}")
        (run / "latest" / "evaluation.json").write_text(text)
        refused(run, 1, "can't be read", "measure again")
    change_json(run / "latest" / "training.json", progress=None)
    refused(run, 1, "is damaged")
