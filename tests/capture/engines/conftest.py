"""A stand-in for vLLM, and captures through it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.process import alive

STAND_IN = Path(__file__).with_name("stand_in.py")


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
