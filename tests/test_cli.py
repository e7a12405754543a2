"""The command line as a whole: failures of the machine are one line too."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from pipeline import cli
from tests.conftest import assert_refused, run_cli


@pytest.mark.parametrize("arguments", [["nonsense"], ["capture", "--nonsense"], ["train"]])
def test_usage_errors_are_one_line(arguments: list[str]) -> None:
    assert_refused(run_cli(*arguments), 2, "--help`")


def test_a_full_disk_is_one_line(monkeypatch, tmp_path: Path) -> None:
    @click.command()
    def fill() -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "00000.safetensors"))

    monkeypatch.setitem(cli.COMMANDS, "fill", ("tests.test_cli:fill", ""))
    monkeypatch.setattr("tests.test_cli.fill", fill, raising=False)
    assert_refused(run_cli("fill"), 1, "00000.safetensors", "No space left on device")
