"""Folders that appear whole or not at all. Files are tested in test_writer, with the caches they make up."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.errors import UsageError, WriteError
from pipeline.files import check_new, new_folder, write_error


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def fill(partial: Path) -> None:
    (partial / "config.json").write_text("{}")
    (partial / "sub").mkdir()
    save_file({"x": torch.zeros(1)}, partial / "sub/model.safetensors")


@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_appears_with_all_its_files(tmp_path, exists):
    folder = tmp_path / "deep/folder"
    if exists:
        folder.mkdir(parents=True)
        inode = folder.stat().st_ino
    with new_folder(folder, last="config.json") as partial:
        fill(partial)
        assert not folder.exists() or [path.name for path in folder.iterdir()] == [".partial"]
    assert names(folder) == ["config.json", "sub", "sub/model.safetensors"]
    assert not exists or folder.stat().st_ino == inode
    assert [path.name for path in folder.parent.iterdir()] == ["folder"]
    modes = {
        stat.S_IMODE(path.stat().st_mode)
        for path in (folder / "config.json", folder / "sub/model.safetensors")
    }
    mask = os.umask(0)
    os.umask(mask)
    assert modes == {0o666 & ~mask}


@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyError("x"), KeyboardInterrupt()]
)
def test_after_an_error_nothing_of_it_remains(tmp_path, exists, error):
    folder = tmp_path / "folder"
    if exists:
        folder.mkdir()
    expected = WriteError if isinstance(error, OSError) else type(error)

    def fail() -> None:
        with new_folder(folder, last="config.json") as partial:
            fill(partial)
            raise error

    with pytest.raises(expected) as caught:
        fail()
    assert names(tmp_path) == (["folder"] if exists else [])
    if expected is WriteError:
        assert str(caught.value) == (
            f"{folder} can't be written (No space left on device): fix that, then run the same command again"
        )


def test_an_error_of_safetensors_is_one_of_writing(tmp_path):
    with (
        pytest.raises(WriteError, match="can't be written"),
        new_folder(tmp_path / "new", last="x") as partial,
    ):
        save_file({"x": torch.zeros(1)}, partial / "no such folder/model.safetensors")
    assert names(tmp_path) == []


@pytest.mark.parametrize("exists", [False, True])
def test_what_a_killed_process_left_is_replaced(tmp_path, exists):
    folder = tmp_path / "folder"
    left = folder / ".partial" if exists else tmp_path / ".folder.partial"
    left.mkdir(parents=True)
    (left / "half a file").write_text("x")
    check_new(folder)
    with new_folder(folder, last="config.json") as partial:
        fill(partial)
    assert names(folder) == ["config.json", "sub", "sub/model.safetensors"]
    assert not left.exists()


def test_a_move_that_fails_half_way_is_undone(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    real = Path.rename

    def rename(path: Path, to: Path) -> Path:
        if path.name == "config.json" and to.parent == folder:
            raise OSError(5, "Input/output error")
        return real(path, to)

    monkeypatch.setattr(Path, "rename", rename)
    with (
        pytest.raises(WriteError, match="Input/output error"),
        new_folder(folder, last="config.json") as partial,
    ):
        fill(partial)
    assert names(tmp_path) == ["folder"]


def test_only_nothing_or_an_empty_directory_is_new(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    check_new(tmp_path / "nothing")
    check_new(tmp_path / "empty")
    for taken, words in ((tmp_path / "file", "is a file"), (tmp_path, "is not empty")):
        with pytest.raises(UsageError, match=words):
            check_new(taken)
        with pytest.raises(UsageError, match=words), new_folder(taken, last="x"):
            raise AssertionError("never entered")


def test_an_error_names_what_is_kept():
    error = write_error("run", OSError(13, "Permission denied"), "older checkpoints are kept")
    assert str(error) == (
        "run can't be written (Permission denied): fix that, then run the same command again; "
        "older checkpoints are kept"
    )
