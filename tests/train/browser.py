"""A headless Chromium for tests, driven over a pipe by its DevTools protocol; no driver is installed."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

SECONDS = 60
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)


def find_browser() -> str | None:
    """The path of a Chromium, if there is one."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page of a browser; a context manager.

    Args:
        program: of `find_browser`.
        profile: an empty folder for what it writes.
    """

    def __init__(self, program: str, profile: Path):
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        # Out of the way of 3 and 4, where the browser looks for them.
        theirs = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (theirs_in, theirs_out)]
        actions = [(os.POSIX_SPAWN_DUP2, fd, number) for fd, number in zip(theirs, (3, 4), strict=True)]
        actions += [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)]
        command = [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self._pid = os.posix_spawn(program, command, os.environ, file_actions=actions, setpgroup=0)
        for fd in (theirs_in, theirs_out, *theirs):
            os.close(fd)
        self._left, self._count, self._session = b"", 0, None
        self.requests: list[str] = []
        """Everything that was asked for since the last `open`."""
        self.problems: list[str] = []
        """What the console showed, and exceptions."""
        self._loaded = False

    def __enter__(self) -> Browser:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *_: object) -> None:
        for fd in (self._out, self._in):
            os.close(fd)
        with suppress(ProcessLookupError):
            os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Do something and return what it gives."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._out, data) :]
        while (answer := self._next()).get("id") != self._count:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, url: str, *, width: int = 1200, height: int = 900) -> None:
        """Load a page and wait until it is there, and what it asks for has been answered."""
        screen = {"deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, **screen)
        self.requests, self.problems, self._loaded = [], [], False
        self.call("Page.navigate", url=url)
        while not self._loaded:
            self._next()
        self.evaluate("new Promise(done => setTimeout(done, 100))")

    def evaluate(self, expression: str) -> Any:
        """The value of an expression in the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def screenshot(self, **clip: float) -> bytes:
        """A PNG of a rectangle of the page: x, y, width, height."""
        options = {"captureBeyondViewport": True, "clip": {**clip, "scale": 1}}
        return base64.b64decode(self.call("Page.captureScreenshot", format="png", **options)["data"])

    def pdf(self) -> bytes:
        """The page as it is printed, on the paper that it asks for."""
        options = {"preferCSSPageSize": True, "printBackground": True}
        return base64.b64decode(self.call("Page.printToPDF", **options)["data"])

    def _next(self) -> dict[str, Any]:
        """The next message; events are kept on the way."""
        end = time.monotonic() + SECONDS
        while b"\0" not in self._left:
            ready, _, _ = select.select([self._in], [], [], max(0, end - time.monotonic()))
            assert ready, f"the browser said nothing for {SECONDS} seconds"
            found = os.read(self._in, 2**20)
            assert found, "the browser is gone"
            self._left += found
        line, _, self._left = self._left.partition(b"\0")
        message = json.loads(line)
        self._event(message.get("method"), message.get("params", {}))
        return message

    def _event(self, method: str | None, values: dict[str, Any]) -> None:
        if method == "Network.requestWillBeSent":
            self.requests.append(values["request"]["url"])
        elif method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Log.entryAdded":
            self.problems.append(values["entry"]["text"])
        elif method == "Runtime.consoleAPICalled":
            self.problems.append(" ".join(str(value.get("value")) for value in values["args"]))
        elif method == "Runtime.exceptionThrown":
            self.problems.append(values["exceptionDetails"]["exception"]["description"])
