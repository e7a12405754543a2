"""Run commands on the pretend device.

python -m tests.gpu_less.pretend [--gpus N] train --cache ...        a `dspark` command
python -m tests.gpu_less.pretend [--gpus N] benchmarks/codecs.py ... a script
python -m tests.gpu_less.pretend [--gpus N] --serve                  commands from standard input

The first two say at their end, on standard error, what made the host wait. The last one reads a JSON list of
words a line and answers each with a JSON object on the standard output that it was started with.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import runpy
import sys
import traceback
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

from tests.gpu_less.pretend import LEDGER, MACHINE, install
from tests.gpu_less.pretend.patches import counts
from tests.gpu_less.pretend.tensors import NOTED


def main() -> None:
    """Install the device and run what the command line names."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu_less.pretend")
    parser.add_argument("--gpus", type=int, default=1, help="pretend GPUs")
    parser.add_argument("--name", help="name of each GPU")
    parser.add_argument("--serve", action="store_true", help="read commands from standard input")
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="command ...")
    given = parser.parse_args()
    torch.set_num_threads(1)
    install(given.gpus, given.name)
    if given.serve:
        serve()
        return
    try:
        run(given.words)
    finally:
        _report()


def run(words: Sequence[str]) -> None:
    """Run a `dspark` command, or a script by its path."""
    if words[0].endswith(".py"):
        sys.argv = list(words)
        runpy.run_path(words[0], run_name="__main__")
        return
    from pipeline.cli import cli

    cli.main(list(words), prog_name="dspark", standalone_mode=False)


def serve() -> None:
    """Answer commands until standard input ends. Words `["call", "module:function", ...]` call a function."""
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)


def answer(words: Sequence[str]) -> dict[str, Any]:
    """Run a command and return its exit code, outputs, counts, and the value of a called function."""
    LEDGER.take()
    MACHINE.device = 0  # as in a new process
    NOTED.clear()
    out, err, value, code = io.StringIO(), io.StringIO(), None, 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            if words[0] == "call":
                module, _, name = words[1].partition(":")
                value = getattr(importlib.import_module(module), name)(*words[2:])
            else:
                code = _exit_code(words)
        except BaseException:  # the test that asked gets to see it
            traceback.print_exc(file=err)
            code = -1
    return {"code": code, "out": out.getvalue(), "err": err.getvalue(), "value": value, **counts()}


def _exit_code(words: Sequence[str]) -> int:
    from click.testing import CliRunner

    from pipeline.cli import cli

    result = CliRunner().invoke(cli, list(words), catch_exceptions=False)
    sys.stdout.write(result.stdout)
    sys.stderr.write(result.stderr)
    return result.exit_code


def _report() -> None:
    for kind, found in LEDGER.take().items():
        if kind != "contexts":
            print(f"{kind}: {sum(found.values())}", file=sys.stderr)
            for note, count in found.most_common(40):
                print(f"  {count:6d}  {note}", file=sys.stderr)


main()
