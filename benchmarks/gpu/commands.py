"""`dspark` commands, in a section's process or killed in a process of their own."""

from __future__ import annotations

import gc
import io
import json
import os
import signal
import sys
import time
from collections.abc import Iterable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from benchmarks.gpu.figures import Figure, Limit, Row, judged
from benchmarks.gpu.work import start_process


def dspark(*words: str | Path) -> str:
    """Run `dspark ...` in this process and return its standard output.

    Compiled code of earlier commands is forgotten, as in a new process, and memory of the GPU is given back:
    a section may start other processes on it.

    Raises:
        RuntimeError: it did not end with exit code 0.
    """
    import torch

    from pipeline.cli import cli

    torch._dynamo.reset()
    arguments, out = [str(word) for word in words], io.StringIO()
    print("$ dspark", *arguments, flush=True)
    began = time.monotonic()
    try:
        with redirect_stdout(out):
            code = cli.main(arguments, prog_name="dspark", standalone_mode=False)
    finally:
        gc.collect()
        torch.cuda.empty_cache()
        print(f"{out.getvalue()}({time.monotonic() - began:.1f} s)\n", flush=True)
    if code:
        raise RuntimeError(f"dspark {arguments[0]} ended with exit code {code}, its message is in the log")
    return out.getvalue()


def dspark_json(*words: str | Path) -> dict[str, Any]:
    """Run `dspark ... --json` in this process and return its object."""
    return json.loads(dspark(*words, "--json"))


def killed_training(words: Iterable[str | Path], step: int, *, pretend: bool) -> int:
    """Run `dspark train ...` in a process that SIGKILL ends after a step. Return its exit code."""
    process = start_process(_train_until, [str(word) for word in words], step, pretend=pretend)
    process.join()
    return process.exitcode


def _train_until(words: list[str], step: int) -> None:
    from train.trainer.trainer import Training

    whole = Training._step

    def deadly(self: Training, packs: Any) -> bool:
        due = whole(self, packs)
        if self.progress.step == step:
            sys.stdout.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return due

    Training._step = deadly
    dspark(*words)


def settings(values: dict[str, Any]) -> list[str]:
    """Return `--set` options."""
    return [word for name, value in values.items() for word in ("--set", f"{name}={value}")]


def last_line(run: Path) -> dict[str, Any]:
    """Return the last logged training step of a run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "tokens_per_s" in line][-1]


def log_rows(case: str, line: dict[str, Any]) -> list[Row]:
    """Return the speed and memory that a log line holds."""
    names = {
        "tokens_per_s": ("tokens", "tokens/s"),
        "data_wait_percent": ("wait for data", "%"),
        "peak_flops_percent": ("share of the peak", "%"),
        "peak_memory_bytes": ("peak memory", "bytes"),
    }
    found = ((*label, line[name]) for name, label in names.items() if line.get(name) is not None)
    return [(case, metric, value, unit) for metric, unit, value in found]


def exact(case: str, metric: str, value: float, wanted: float) -> Figure:
    """Return a figure that has to be that value."""
    return judged([(case, metric, value, "")], {metric: Limit(wanted, wanted)}, pretend=False)[0]
