"""Stop on signals: a loop checks between two steps whether one came."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from pipeline.errors import StoppedError

# Ctrl-C within this time of the first signal counts as the same request.
AGAIN_SECONDS = 2.0


class StopRequest:
    """The first signal that asked this process to stop, if any. Made by `stop_on_signals`."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def check(self, what_is_kept: str) -> None:
        """Raise StoppedError if a signal came. The command line then exits with 130, 143 or 129."""
        if self.signal is not None:
            raise StoppedError(self.signal, f"stopped by {self.signal.name}: {what_is_kept}")


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Record SIGINT, SIGTERM and SIGHUP in a StopRequest instead of ending the process.

    The same request may come several times, because a scheduler signals every process and torchrun signals
    its own again. So only a second Ctrl-C, after `AGAIN_SECONDS`, interrupts as usual. A signal that is
    ignored already, such as SIGHUP under nohup or SIGINT of a background job, stays ignored. Outside the main
    thread, where Python allows no handlers, nothing changes.
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
