"""Section `tests`: what pytest knows about GPUs."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from benchmarks.gpu.commands import exact
from benchmarks.gpu.figures import Figure, Limit, judged
from benchmarks.gpu.place import Place
from benchmarks.gpu.work import ROOT

PROCESSES = 4
MARK = re.compile(r"mark\.gpu\b")
# On a pretend device only what needs no compiler and no second process.
PRETENDED = "bf16_is_near or (cpus_numbers and sdpa)"


def tests(place: Place) -> list[Figure]:
    """Run the tests that are marked `gpu`: none may fail, and some must pass."""
    place = place.sized()
    files = sorted(path for path in (ROOT / "tests").rglob("test_*.py") if MARK.search(path.read_text()))
    report = place.folder / "report.xml"
    words = ["-m", "gpu", f"--junitxml={report}", "-p", "no:cacheprovider", "--durations=5", *map(str, files)]
    if place.pretend:
        import pytest

        pytest.main([*words, "-k", PRETENDED, "--noconftest", "--assert=plain"])
    else:
        if importlib.util.find_spec("xdist"):  # most of the time goes into compiling, on one core each
            words += ["--numprocesses", str(min(PROCESSES, os.cpu_count() or 1))]
        subprocess.run([sys.executable, "-m", "pytest", *words], cwd=ROOT)
    return figures_of(report, place)


def figures_of(report: Path, place: Place) -> list[Figure]:
    """Return the counts of a JUnit report.

    Raises:
        RuntimeError: pytest ended before it wrote one.
    """
    if not report.is_file():
        raise RuntimeError("pytest ended without a report, its output is in the log")
    suite = next(ElementTree.parse(report).iter("testsuite"))
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    bad = counts["failures"] + counts["errors"]
    case = "pytest -m gpu"
    passed = counts["tests"] - bad - counts["skipped"]
    rows = [(case, "passed", passed, "tests"), (case, "skipped", counts["skipped"], "tests")]
    return [
        exact(case, "failed", bad, 0),
        *judged(rows, {"passed": Limit(at_least=1)}, pretend=place.pretend),
    ]
