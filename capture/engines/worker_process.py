"""An engine's worker process: lines of JSON to it and from it. See `capture/engines/worker/run_vllm.py`."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.child import GRACE, end, last_line, start

# Variables by which torchrun tells a process its place among others, which an engine has no part in.
_LAUNCHER = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
)
WORKER = Path(__file__).parent / "worker" / "run_vllm.py"


class EngineEndedError(Exception):
    """The worker, or its engine, has ended; `str()` is the reason."""


class WorkerProcess:
    """A worker at work. It and all that it started end with `close`, and with this process.

    Args:
        python: the interpreter of the engine's environment.
        config: the first line.
        log: file of its output.
        worker: its program.

    Raises:
        EngineError: it can't be started.
    """

    def __init__(self, python: Path, config: Mapping[str, Any], log: Path, worker: Path = WORKER):
        self._log = log
        self._inbox: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        read, write = os.pipe()
        try:
            self._process = start(
                [python, worker, write], log, without=_LAUNCHER, stdin=subprocess.PIPE, pass_fds=(write,)
            )
        except BaseException:
            os.close(read)
            raise
        finally:
            os.close(write)
        for work, given in ((self._receive, read), (self._send, self._process.stdin)):
            threading.Thread(target=work, args=(given,), daemon=True).start()
        self.send(config)

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a line, without waiting until it is read."""
        self._outbox.put((json.dumps(message) + "\n").encode())

    def receive(self, seconds: float) -> dict[str, Any] | None:
        """Return the next line; None if there is none within `seconds`.

        Raises:
            EngineEndedError: there will be none.
        """
        with suppress(queue.Empty):
            message = self._inbox.get(timeout=seconds)
            if message is None:
                self._inbox.put(None)  # for the next call
                raise EngineEndedError(f"{last_line(self._log)}; all of its output is in {self._log}")
            if "fatal" in message:
                raise EngineEndedError(f"{message['fatal']}; all of its output is in {self._log}")
            return message
        return None

    def close(self) -> None:
        """Ask the worker to end by closing its input, then end it and all that it started."""
        self._outbox.put(None)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(GRACE)
        end(self._process)

    def _send(self, pipe: Any) -> None:
        with suppress(OSError), pipe:
            while (line := self._outbox.get()) is not None:
                pipe.write(line)
                pipe.flush()

    def _receive(self, descriptor: int) -> None:
        with open(descriptor, encoding="utf-8") as lines, suppress(OSError, ValueError):
            for line in lines:
                self._inbox.put(json.loads(line))
        self._inbox.put(None)
