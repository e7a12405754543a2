"""Runs to export. All are read-only by agreement."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.train.exports import trained


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    """A run of the vanilla head. Read-only by agreement."""
    return trained(tmp_path_factory.mktemp("runs") / "vanilla", cache_dir)


@pytest.fixture(scope="session")
def rnn_dir(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    return trained(tmp_path_factory.mktemp("runs") / "rnn", cache_dir, draft__markov_head="rnn")


@pytest.fixture(scope="session")
def bare_dir(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    """A run of a draft without Markov and confidence head."""
    heads = {"draft__markov_head": "none", "draft__confidence_head": "false"}
    return trained(tmp_path_factory.mktemp("runs") / "bare", cache_dir, **heads)
