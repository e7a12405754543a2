"""An S3 server on this machine, and a cache in it."""

from __future__ import annotations

import itertools
import logging
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.cache.remote.upload import upload
from pipeline.remote.address import Address
from pipeline.remote.objects import Objects
from tests.pipeline.written import small_cache

_numbers = itertools.count()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Return the URL of an S3 server that has the bucket `bucket`."""
    pytest.importorskip("obstore")
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
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


@pytest.fixture
def local_cache(scratch) -> Path:
    return small_cache(scratch(), count=12)


@pytest.fixture
def remote_cache(s3: Address, local_cache: Path) -> Address:
    upload(local_cache, Objects(s3))
    return s3
