"""A section in a process of its own, and what is kept of it between calls."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.gpu.figures import FAILED, NOT_RUN, PASSED, SHORT, SKIPPED, Outcome, SkipSection
from benchmarks.gpu.place import Place
from benchmarks.gpu.sections import SECTIONS, Section

ROOT = Path(__file__).parents[2]
CODE = ("pipeline", "capture", "train", "benchmarks", "tests", "configs")
# What makes figures of an earlier call those of another machine or code.
PACKAGES = ("torch", "transformers", "triton")
GRACE_SECONDS = 5
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": str(ROOT)}


def machine_key(pretend: bool) -> str:
    """Return a name for this machine, for a folder's name to begin with."""
    name = re.sub(r"[^A-Za-z0-9.]+", "-", platform.node()) or "machine"
    return f"pretend-{name}-" if pretend else f"gpu-{name}-"


def state_key(pretend: bool) -> str:
    """Return a name for this code, machine and these versions, for a folder."""
    digest = hashlib.sha256(repr((platform.node(), _gpus(), pretend, sys.version)).encode())
    for name in PACKAGES:
        try:
            digest.update(version(name).encode())
        except PackageNotFoundError:
            digest.update(b"none")
    files = [
        path for folder in CODE for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".toml")
    ]
    for path in sorted(files):
        digest.update(path.relative_to(ROOT).as_posix().encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return machine_key(pretend) + digest.hexdigest()[:12]


def clear_other_scratch(folder: Path, pretend: bool) -> None:
    """Remove the scratch that this machine left for other code: nothing will go on with it."""
    for other in folder.parent.glob(f"{machine_key(pretend)}*"):
        if other != folder:
            for path in other.iterdir():
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)


def _gpus() -> str:
    """Return the driver's list of GPUs; torch is not asked, it would open a context."""
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def start_process(
    function: Callable[..., None], *arguments: object, pretend: bool
) -> multiprocessing.Process:
    """Start a function in a new process.

    It begins with a fresh Python, as CUDA demands. On the pretend device it is a fork of this process, which
    has the device installed and everything imported.
    """
    context = multiprocessing.get_context("fork" if pretend else "spawn")
    process = context.Process(target=function, args=arguments)
    process.start()
    return process


def run_section(section: Section, folder: Path, seconds: float, *, pretend: bool) -> Outcome:
    """Run a section and return what became of it.

    Args:
        folder: where its log, result and scratch go.
        seconds: what is left of the budget. A section that is stopped by it has not failed.
    """
    missing = section.missing()
    if missing:
        why = f"needs {', '.join(missing)}: install with `pip install {' '.join(missing)}`"
        return Outcome(section.name, SKIPPED, reason=why)
    scratch, result, log = (folder / f"{section.name}{end}" for end in ("", ".json", ".log"))
    for path in (scratch, result):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    scratch.mkdir(parents=True)
    began = time.monotonic()
    process = start_process(_work, section, Place(scratch, pretend), result, log, pretend=pretend)
    most = min(seconds, section.most_seconds)
    try:
        process.join(most)
        outcome = _outcome(section, process, result, cut_short=seconds < section.most_seconds)
    except BaseException:  # Ctrl-C does not reach a process of another group
        _stop(process)
        raise
    outcome.seconds, outcome.log = time.monotonic() - began, str(log)
    if outcome.status != NOT_RUN:
        outcome.save(result)
    if outcome.status in (PASSED, SKIPPED):
        clear(section, folder)
    return outcome


def clear(section: Section, folder: Path) -> None:
    """Remove the scratch that nobody needs after a section has passed or was skipped.

    What other sections use stays until each of them has: one that failed or did not run will be repeated.
    """
    unneeded = [] if section.keeps_for else [section.name]
    for each in SECTIONS.values():
        if section.name in each.keeps_for and all(_is_over(name, folder) for name in each.keeps_for):
            unneeded.append(each.name)
    for name in unneeded:
        shutil.rmtree(folder / name, ignore_errors=True)


def _is_over(section: str, folder: Path) -> bool:
    path = folder / f"{section}.json"
    return path.is_file() and Outcome.load(path).status in (PASSED, SKIPPED)


def _outcome(section: Section, process: multiprocessing.Process, result: Path, *, cut_short: bool) -> Outcome:
    if process.exitcode is None:
        _stop(process)
        if cut_short:
            return Outcome(section.name, NOT_RUN, reason="the budget ended first")
        return Outcome(section.name, FAILED, reason=f"took more than {section.most_seconds} s")
    if process.exitcode != 0 or not result.is_file():
        return Outcome(section.name, FAILED, reason=f"its process ended with exit code {process.exitcode}")
    return Outcome.load(result)


def _stop(process: multiprocessing.Process) -> None:
    """End a section's process and those that it started."""
    if process.exitcode is None:
        for number in (signal.SIGTERM, signal.SIGKILL):  # torchrun ends its workers at the first
            with suppress(ProcessLookupError):  # it is just ending
                os.killpg(process.pid, number)
            process.join(GRACE_SECONDS)


def _work(section: Section, place: Place, result: Path, log: Path) -> None:
    """Run a section in this process, and write its outcome."""
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(output, number)
        setattr(sys, name, os.fdopen(number, "w", buffering=1, closefd=False))
    os.chdir(ROOT)
    os.environ["DSPARK_TOKENS"] = str(place.folder / "tokens")
    outcome = Outcome(section.name, PASSED)
    try:
        outcome.figures = section.function()(place)
    except SkipSection as skip:
        outcome.status, outcome.reason = SKIPPED, str(skip)
    except Exception as error:
        traceback.print_exc()
        first = (str(error).splitlines() or [""])[0]
        outcome.status, outcome.reason = FAILED, f"{type(error).__name__}: {first}"[:300]
    else:
        outcome.reason = "; ".join(place.notes)
        if not all(figure.holds for figure in outcome.figures):
            outcome.status = SHORT
    sys.stdout.flush()
    outcome.save(result)
