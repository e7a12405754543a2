"""A process with pretend GPUs, for tests: they send it commands and read what it saw."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.gpu_less.pretend.ledger import ROOT, Note


@dataclass(frozen=True)
class Outcome:
    """Outcome of a command."""

    code: int
    out: str
    err: str
    value: Any
    """Of a called function."""
    syncs: dict[Note, int]
    contexts: dict[Note, int]
    faults: dict[Note, int]

    @property
    def json(self) -> Any:
        """Output of a command with --json."""
        return json.loads(self.out)


class Session:
    """A process with pretend GPUs. Use it in a `with` block."""

    def __init__(self, gpus: int = 1):
        command = [sys.executable, "-m", "tests.gpu_less.pretend", "--gpus", str(gpus), "--serve"]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            text=True,
        )

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def run(self, *words: str | Path) -> Outcome:
        """Run `dspark ...`, whatever comes of it."""
        print(json.dumps([str(word) for word in words]), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        assert line, f"the process ended with {self._process.wait()}"
        found = json.loads(line)
        for kind in ("syncs", "contexts", "faults"):
            notes = found[kind]
            counts = [each.pop("count") for each in notes]
            rows = [Note(**{**each, "lines": tuple(each["lines"])}) for each in notes]
            found[kind] = dict(zip(rows, counts, strict=True))
        return Outcome(**found)

    def ok(self, *words: str | Path) -> Outcome:
        """Run `dspark ...`, which must succeed without a fault."""
        outcome = self.run(*words)
        assert outcome.code == 0, f"{words[:2]}: {outcome.out[-500:]}{outcome.err[-2000:]}"
        assert not outcome.faults, "\n".join(f"{n} x {note}" for note, n in outcome.faults.items())
        return outcome

    def call(self, function: str, *words: str | Path) -> Outcome:
        """Call `module:function` with words; it must return, without a fault, a value for JSON."""
        return self.ok("call", function, *words)
