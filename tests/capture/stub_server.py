"""A real HTTP server that speaks enough of OpenAI's chat completions, and breaks where it is told to."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "tiny-served"


def question_of(request: dict[str, Any]) -> str:
    """The last thing said before the answer, by which faults are assigned and answers told apart."""
    return request["messages"][-1]["content"]


def answer_to(request: dict[str, Any]) -> str:
    """What the stub says: it depends on the whole conversation, so that a wrong history shows."""
    said = "; ".join(f"{m['role'][0]}:{m['content']}" for m in request["messages"][:-1])
    return f"To {question_of(request)} after [{said}] (seed {request['seed']})"


class StubServer(ThreadingHTTPServer):
    """Answers deterministically; `faults` names what goes wrong first, by question, in order."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.models: list[str] | int = [MODEL]
        """What it lists, or the status with which it refuses to."""
        self.faults: dict[str, list[str]] = {}
        self.say: Callable[[dict[str, Any]], dict[str, Any]] = lambda request: {"content": answer_to(request)}
        """The message to answer with."""
        self.meet: threading.Barrier | None = None
        """Where requests wait for each other before they are answered."""
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str] = []
        """The Authorization header of each request."""
        self.tries: Counter[str] = Counter()
        self.in_flight = self.most_in_flight = 0
        self.closing = threading.Event()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that give up on us are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    server: StubServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        models = self.server.models
        if isinstance(models, int):
            self._send(models, {"error": {"message": "no list"}})
        else:
            self._send(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in models]})

    def do_POST(self) -> None:
        server = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = question_of(request)
        with server.lock:
            server.requests.append(request)
            server.keys.append(self.headers.get("Authorization", ""))
            server.tries[question] += 1
            server.in_flight += 1
            server.most_in_flight = max(server.most_in_flight, server.in_flight)
            waiting = server.faults.get(question)
            fault = waiting.pop(0) if waiting else ""
        try:
            if server.meet is not None:
                server.meet.wait(timeout=10)
            self._react(fault, request)
        finally:
            with server.lock:
                server.in_flight -= 1

    def _react(self, fault: str, request: dict[str, Any]) -> None:
        if fault.isdigit():
            headers = {"Retry-After": "0"} if fault == "429" else {}
            self._send(int(fault), {"error": {"message": f"stub says {fault}"}}, headers)
        elif fault == "hang":
            self.server.closing.wait(30)
        elif fault == "drop":
            self.close_connection = True
        elif fault == "cut":  # a body shorter than announced
            self._send_bytes(200, b'{"choices": [', length=500)
        elif fault == "garbage":
            self._send_bytes(200, b'{"choices": [{"message": {"cont')
        elif fault == "empty":
            self._send(200, {"choices": []})
        elif fault == "html":
            self._send_bytes(502, b"<html>bad\n gateway</html>", content_type="text/html")
        elif fault == "slow":
            time.sleep(0.2)
            self._answer(request, {})
        else:
            self._answer(request, {"finish_reason": fault} if fault else {})

    def _answer(self, request: dict[str, Any], more: dict[str, Any]) -> None:
        message = {"role": "assistant", **self.server.say(request)}
        choice = {"index": 0, "message": message, "finish_reason": "stop", **more}
        self._send(200, {"id": "1", "object": "chat.completion", "model": MODEL, "choices": [choice]})

    def _send(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        self._send_bytes(status, json.dumps(body).encode(), headers=headers)

    def _send_bytes(
        self,
        status: int,
        body: bytes,
        *,
        length: int | None = None,
        content_type: str = "application/json",
        headers: dict[str, str] | None = None,
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def stub_server() -> Iterator[StubServer]:
    """A server at work for as long as the block lasts."""
    server = StubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()
