"""Stop when asked to: signals become a question that a loop asks between two steps."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from pipeline.errors import StoppedError

# Ctrl-C within so many seconds of the first signal is the same request.
AGAIN_SECONDS = 2.0


class StopRequest:
    """Whether a signal asked the process to stop. Made by `stop_on_signals`."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def check(self, what_is_kept: str) -> None:
        """Raise StoppedError if a signal came; the command line makes exit code 130, 143 or 129 of it."""
        if self.signal is not None:
            raise StoppedError(self.signal, f"stopped by {self.signal.name}: {what_is_kept}")


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Note SIGINT, SIGTERM and SIGHUP instead of dying of them.

    The same request may come more than once: a scheduler asks every process and torchrun asks its own again.
    So only Ctrl-C, pressed again after a moment, acts as it always does. What is ignored already, as SIGHUP
    under nohup or SIGINT in a script's background, stays ignored. Outside the main thread, where Python
    allows no handlers, signals stay as they are.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    asked = 0.0

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if request.signal is None:
            request.signal, asked = signal.Signals(number), time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - asked > AGAIN_SECONDS:
            signal.default_int_handler(number, frame)

    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    before = {n: handler for n, handler in handlers.items() if handler not in (signal.SIG_IGN, None)}
    try:
        for number in before:
            signal.signal(number, note)
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
