"""Fixtures: an S3 server on this machine, and an empty address there."""

from __future__ import annotations

import itertools
import logging
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pipeline.remote.address import Address

_numbers = itertools.count()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Return the URL of an S3 server that has the bucket `bucket`."""
    from moto.server import ThreadedMotoServer  # heavy, and for these tests alone

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    urllib.request.urlopen(urllib.request.Request(f"{url}/bucket", method="PUT")).close()
    yield url
    server.stop()


@pytest.fixture
def s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Address:
    """Return an empty address on the server, with the variables by which obstore finds it."""
    variables = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_ALLOW_HTTP": "true",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return Address(f"s3://bucket/{next(_numbers)}/cache")


class Faulty:
    """A server in front of the S3 server that fails as it is told. Requests to `shards/` alone are affected.

    `faults` has a function for each of the next requests; each is given the answer's status and body, and
    returns what is sent instead.
    """

    def __init__(self, server: str):
        self.faults: list[Callable[[int, bytes], tuple[int, bytes]]] = []
        self.requests: list[str] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_request(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                headers = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "connection")}
                headers.setdefault(
                    "Content-Type", "application/octet-stream"
                )  # not a form, which has no body
                request = urllib.request.Request(
                    f"{server}{self.path}",
                    self.rfile.read(length) if length else None,
                    headers,
                    method=self.command,
                )
                try:
                    with urllib.request.urlopen(request) as found:
                        status, fields, body = found.status, found.headers, found.read()
                except urllib.error.HTTPError as error:
                    status, fields, body = error.code, error.headers, error.read()
                outer.requests.append(f"{self.command} {self.path}")
                promised = len(body)
                if "/shards/" in self.path and outer.faults:
                    status, body = outer.faults.pop(0)(status, body)
                self.send_response(status)
                for name, value in fields.items():
                    if name.lower() not in (
                        "content-length",
                        "transfer-encoding",
                        "connection",
                        "date",
                        "server",
                    ):
                        self.send_header(name, value)
                self.send_header(
                    "Content-Length",
                    fields.get("Content-Length") if self.command == "HEAD" else str(promised),
                )
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)
                if len(body) < promised:
                    self.close_connection = True

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_request  # noqa: N815

            def log_message(self, *_arguments) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def faulty(s3_server: str, s3: Address, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faulty]:
    """Put a faulty server in front of the S3 server, for objects opened from now on."""
    server = Faulty(s3_server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    yield server
    server.close()
