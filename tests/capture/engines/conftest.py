"""A stand-in for vLLM, and captures through it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.process import alive
from pipeline.remote.address import Address
from tests.capture.conftest import arguments
from tests.conftest import run_ok

STAND_IN = Path(__file__).with_name("stand_in.py")
EXACT = {"context_codec": "fp32", "last_codec": "fp32", "layers": "0,3"}
FEW = {"num_samples": 6, "shard_tokens": 128}


@pytest.fixture(scope="session")
def engine_python(tmp_path_factory) -> Path:
    """A "Python" that is the stand-in, whatever it is told to run."""
    path = tmp_path_factory.mktemp("engine") / "python"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {STAND_IN} "$@"\n')
    path.chmod(0o755)
    return path


@pytest.fixture(autouse=True)
def engines_end(tmp_path, monkeypatch) -> Iterator[None]:
    """Whatever happens, no engine outlives the capture that started it."""
    pids = tmp_path / "pids"
    monkeypatch.setenv("PIDS", str(pids))
    yield
    deadline = time.monotonic() + 20
    for pid in map(int, pids.read_text().split() if pids.exists() else []):
        while alive(pid):
            assert time.monotonic() < deadline, f"engine {pid} is left"
            time.sleep(0.05)


@pytest.fixture(scope="module")
def words(engine_python, fp32_target, few):
    """The words of a one-pass capture."""

    def made(cache: Path | Address, *more: str, **options: Any) -> list[str | Path]:
        usual = {"engine": "vllm", "engine_python": engine_python, "max_new_tokens": 4, **EXACT, **FEW}
        return [*arguments(fp32_target, few, str(cache), **{**usual, **options}), "--regenerate", *more]

    return made


@pytest.fixture(scope="module")
def calm(tmp_path_factory, words) -> Path:
    """A cache in a directory, which nothing disturbed."""
    folder = tmp_path_factory.mktemp("calm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIDS", str(folder / "pids"))
        run_ok(*words(folder / "cache"))
    return folder / "cache"
