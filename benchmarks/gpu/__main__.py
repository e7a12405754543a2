"""Prove and measure this project on a GPU machine: one table, and a failure if a figure falls short.

    python -m benchmarks.gpu                       # all sections, ten minutes
    python -m benchmarks.gpu --only loss,step      # some of them
    python -m benchmarks.gpu --list

Run it from the repository's root with a Python that has torch for CUDA. It needs no network. Sections run one
after the other, each in a process of its own. Those that passed are not repeated by later calls with the same
code, versions and machine. Figures are appended to benchmarks/results.csv.

Exit code: 0 if nothing failed, also where sections were skipped or did not fit into the budget; 1 if a
section failed or a figure fell short; 2 for a wrong command line.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.gpu.figures import NOT_RUN, PASSED, Outcome, failures, heading, lines_of
from benchmarks.gpu.sections import SECTIONS, Section
from benchmarks.gpu.work import ENVIRONMENT, ROOT, clear_other_scratch, run_section, state_key

BUDGET_SECONDS = 600


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; end with exit code 2 if it is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="NAMES", help="sections, separated by commas; default: all")
    parser.add_argument(
        "--seconds", type=float, default=BUDGET_SECONDS, help=f"budget of this call [{BUDGET_SECONDS}]"
    )
    parser.add_argument("--fresh", action="store_true", help="repeat what an earlier call finished")
    parser.add_argument("--list", action="store_true", help="print the sections and end")
    parser.add_argument("--folder", type=Path, default=ROOT / ".cache" / "gpu", help="logs and results")
    parser.add_argument(
        "--pretend",
        action="store_true",
        help="tiny shapes on a pretend GPU: nothing is recorded, no speed judged",
    )
    given = parser.parse_args(words)
    names = given.only.split(",") if given.only else list(SECTIONS)
    unknown = [name for name in names if name not in SECTIONS]
    if unknown:
        parser.error(f"no section {', '.join(unknown)}: expected some of {', '.join(SECTIONS)}")
    given.sections = [SECTIONS[name] for name in SECTIONS if name in names]
    return given


def main(words: Sequence[str] | None = None) -> int:
    """Run the sections, print the table, and return the exit code."""
    given = parse(words)
    if given.list:
        for section in given.sections:
            print(f"{section.name:10} about {section.seconds:4d} s  {section.about}")
        return 0
    os.environ.update(ENVIRONMENT)
    folder = given.folder / state_key(given.pretend)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"error: another call works in {folder}: wait for its end", file=sys.stderr)
            return 1
        clear_other_scratch(folder, given.pretend)
        if given.fresh:
            for section in given.sections:
                shutil.rmtree(folder / section.name, ignore_errors=True)
                (folder / f"{section.name}.json").unlink(missing_ok=True)
        return conclude(run_all(given, folder))


def run_all(given: argparse.Namespace, folder: Path) -> list[Outcome]:
    """Run the sections that are left, and print the table. Without a GPU the first one ends it."""
    began, outcomes = time.monotonic(), []
    print(heading(), flush=True)
    for section in given.sections:
        outcome = finished(folder / f"{section.name}.json")
        if outcome is None:
            left = given.seconds - (time.monotonic() - began)
            outcome = run(section, folder, left, pretend=given.pretend)
        outcomes.append(outcome)
        print("\n".join(lines_of(outcome)), flush=True)
        if section.name == "machine" and outcome.bad:
            break
    return outcomes


def finished(path: Path) -> Outcome | None:
    """Return what an earlier call found, if it passed."""
    if not path.is_file():
        return None
    outcome = Outcome.load(path)
    outcome.earlier = True
    return outcome if outcome.status == PASSED else None


def run(section: Section, folder: Path, left: float, *, pretend: bool) -> Outcome:
    """Run a section if it fits into the seconds that are left."""
    if left < (1 if pretend else section.seconds):
        return Outcome(section.name, NOT_RUN, reason=f"{left:.0f} s left, it takes about {section.seconds} s")
    if pretend:
        import benchmarks.gpu.pretending  # noqa: F401  installs the device, which forked processes share
    return run_section(section, folder, left, pretend=pretend)


def conclude(outcomes: list[Outcome]) -> int:
    """Print what fell short and what was left out. Return the exit code."""
    left_out = [outcome.section for outcome in outcomes if outcome.status == NOT_RUN]
    if left_out:
        print(f"not run: {', '.join(left_out)}; the same command goes on with them")
    bad = failures(outcomes)
    for line in bad:
        print(f"error: {line}", file=sys.stderr)
    if not bad:
        passed = sum(outcome.status == PASSED for outcome in outcomes)
        print(f"{passed} of {len(outcomes)} sections passed, none failed")
    return 1 if bad else 0


if __name__ == "__main__":
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # as an exception, so that a section's process ends
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("interrupted: the same command goes on with the section that was running")
