"""A stand-in for vLLM, and captures through it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

STAND_IN = Path(__file__).with_name("stand_in.py")


@pytest.fixture(scope="session")
def engine_python(tmp_path_factory) -> Path:
    """A "Python" that is the stand-in, whatever it is told to run."""
    path = tmp_path_factory.mktemp("engine") / "python"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {STAND_IN} "$@"\n')
    path.chmod(0o755)
    return path
