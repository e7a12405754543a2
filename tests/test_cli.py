"""The command line as a whole: failures of the machine are one line too."""

from __future__ import annotations

import importlib
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


@pytest.mark.parametrize("package", ["capture", "pipeline.cache", "train", "train.draft", "train.losses"])
def test_every_name_that_a_package_offers_is_there(package: str) -> None:
    module = importlib.import_module(package)
    assert len(module.__all__) > 1
    for name in module.__all__:
        assert getattr(module, name) is not None, name


def test_what_the_seeds_name_is_in_its_package() -> None:
    """The public names, and where they are documented to be."""
    for name in ("compute_dspark_loss", "DSparkTrainerModule", "DSparkStepMetrics", "Qwen3DSparkModel"):
        assert name in importlib.import_module("train").__all__
