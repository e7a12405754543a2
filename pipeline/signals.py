"""Stop when asked to: SIGINT and SIGTERM become a question that a loop asks between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from pipeline.errors import StoppedError


class StopRequest:
    """Whether a signal asked the process to stop. Made by `stop_on_signals`."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def check(self, what_is_kept: str) -> None:
        """Raise StoppedError, which the command line turns into exit code 130 or 143, if a signal came."""
        if self.signal is not None:
            raise StoppedError(self.signal, f"stopped by {self.signal.name}: {what_is_kept}")


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Note the first SIGINT or SIGTERM instead of dying of it; a second one acts as it always does.

    Outside the main thread, where Python allows no handlers, signals stay as they are.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def note(number: int, _frame: FrameType | None) -> None:
        request.signal = signal.Signals(number)
        for each, handler in before.items():
            signal.signal(each, handler)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in before:
            signal.signal(number, note)
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
