"""`python -m benchmarks.gpu --pretend` and sections that go wrong, in one process that installs the device.

python -m tests.gpu_less.gpu_script FOLDER     writes what each call printed to FOLDER/calls.json
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
from pathlib import Path

from benchmarks.gpu import __main__ as script
from benchmarks.gpu import work
from benchmarks.gpu.figures import Figure, Limit, SkipSection, judged
from benchmarks.gpu.place import Place
from benchmarks.gpu.sections import Section

HERE = "tests.gpu_less.gpu_script"


def good(place: Place) -> list[Figure]:
    """Pass, and leave a line in the log."""
    print("a line of the section")
    return judged([("case", "figure", 2.0, "s")], {"figure": Limit(at_most=2.0)}, pretend=place.pretend)


def short(place: Place) -> list[Figure]:
    """Fall short with one of three figures; the limit on speed does not count on the pretend device."""
    rows = [("slow case", "figure", 3.0, "s"), ("case", "ratio", 3.0, "times"), ("case", "other", 1.0, "")]
    limits = {"slow case figure": Limit(at_most=1.0, speed=True), "ratio": Limit(at_most=2.5)}
    return judged(rows, limits, pretend=place.pretend)


def crash(_place: Place) -> list[Figure]:
    """End as a crash of the driver does: without a word."""
    os._exit(7)


def wrong(_place: Place) -> list[Figure]:
    """Raise an error of two lines."""
    raise ValueError("expected this\nand that")


def endless(_place: Place) -> list[Figure]:
    """Never end."""
    time.sleep(600)
    return []


def missing(_place: Place) -> list[Figure]:
    """Say that something is missing."""
    raise SkipSection("needs a second GPU")


class Impatient(Section):
    """A section that is stopped at once."""

    most_seconds = 1


BAD = (
    Section("good", "", f"{HERE}:good", 1),
    Section("short", "", f"{HERE}:short", 1),
    Section("crash", "", f"{HERE}:crash", 1),
    Section("wrong", "", f"{HERE}:wrong", 1),
    Impatient("endless", "", f"{HERE}:endless", 1),
    Section("missing", "", f"{HERE}:missing", 1),
    Section("packages", "", f"{HERE}:good", 1, needs=("no_such_package",)),
)


def call(*words: str) -> dict:
    """Run the script, and return its exit code, its output and the sections that it started."""
    out, err, started = io.StringIO(), io.StringIO(), []
    run_section = work.run_section

    def watched(section: Section, *given: object, **options: object) -> object:
        started.append(section.name)
        return run_section(section, *given, **options)

    script.run_section = watched
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = script.main(words)
    script.run_section = run_section
    return {"code": code, "out": out.getvalue(), "err": err.getvalue(), "started": started}


def main(folder: Path) -> None:
    """Run the whole script twice, then the bad sections with several options."""
    usual = ("--pretend", "--folder", str(folder / "state"))
    calls = {
        "whole": call(*usual),
        "again": call(*usual),
        "no time": call(*usual, "--fresh", "--seconds", "0"),
    }
    script.SECTIONS = {section.name: section for section in BAD}
    calls["bad"] = call(*usual)
    calls["bad again"] = call(*usual, "--only", "good,short")
    calls["fresh"] = call(*usual, "--only", "good", "--fresh")
    (folder / "calls.json").write_text(json.dumps(calls))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
