"""Two runs to report about, and the pages about them. All are read-only by agreement."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.train.reports import Page, drawn, make_runs, report

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@pytest.fixture(scope="session")
def runs(cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return make_runs(cache_dir, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def one(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Page:
    return report(runs[0], out=tmp_path_factory.mktemp("one") / "report.html")


@pytest.fixture(scope="session")
def both(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Page:
    return report(*runs, out=tmp_path_factory.mktemp("both") / "report.html")


@pytest.fixture(scope="session")
def axes(runs: list[Path]) -> dict[str, Axes]:
    """Of each figure of the page about the run that has everything."""
    return drawn(runs[0])
