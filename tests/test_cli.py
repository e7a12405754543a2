"""The command line as a whole: failures of the machine are one line too."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
import torch

from pipeline import cli
from tests.conftest import assert_refused, run_cli


@pytest.mark.parametrize("arguments", [["nonsense"], ["--nonsense"], ["capture", "--nonsense"], ["train"]])
def test_usage_errors_are_one_line(arguments: list[str]) -> None:
    assert_refused(run_cli(*arguments), 2, "--help`")


def test_a_full_disk_is_one_line(monkeypatch, tmp_path: Path) -> None:
    @click.command()
    def fill() -> None:
        raise OSError(28, "No space left on device", str(tmp_path / "00000.safetensors"))

    monkeypatch.setitem(cli.COMMANDS, "fill", ("tests.test_cli:fill", ""))
    monkeypatch.setattr("tests.test_cli.fill", fill, raising=False)
    assert_refused(run_cli("fill"), 1, "00000.safetensors", "No space left on device")


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has ..."),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["python", "cuda", "cpu"],
)
def test_memory_that_runs_out_is_one_line_with_a_remedy(monkeypatch, error) -> None:
    @click.command()
    def eat() -> None:
        raise error

    monkeypatch.setitem(cli.COMMANDS, "eat", ("tests.test_cli:eat", ""))
    monkeypatch.setattr("tests.test_cli.eat", eat, raising=False)
    assert_refused(run_cli("eat"), 1, "out of memory", "--batch-tokens")
