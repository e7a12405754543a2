"""An S3 server of this machine, moto in a process of its own, for benchmarks of object stores."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

PORT = 5055
BUCKET = "bucket"
_CODE = (
    "import logging, time; from moto.server import ThreadedMotoServer; "
    "logging.getLogger('werkzeug').setLevel(logging.ERROR); "
    f"ThreadedMotoServer('127.0.0.1', {PORT}, verbose=False).start(); time.sleep(1e6)"
)


@contextmanager
def s3_server() -> Iterator[str]:
    """Run the server, with an empty bucket and the variables by which obstore finds it. Yields its URL."""
    url = f"http://127.0.0.1:{PORT}"
    os.environ |= {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": url,
        "AWS_ALLOW_HTTP": "true",
    }
    server = subprocess.Popen([sys.executable, "-c", _CODE])
    try:
        _wait(url)
        yield url
    finally:
        server.kill()


def _wait(url: str) -> None:
    for _ in range(100):
        try:
            urllib.request.urlopen(urllib.request.Request(f"{url}/{BUCKET}", method="PUT")).close()
            return
        except OSError:
            time.sleep(0.2)
    sys.exit("the S3 server does not start")
