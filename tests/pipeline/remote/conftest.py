"""A small cache, in a directory and in an object store."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.cache.remote.sync import sync
from pipeline.remote.address import Address
from tests.pipeline.written import small_cache
from tests.s3 import faulty, s3, s3_server

__all__ = ["faulty", "s3", "s3_server"]


@pytest.fixture
def local_cache(scratch) -> Path:
    return small_cache(scratch(), count=12)


@pytest.fixture
def remote_cache(s3: Address, local_cache: Path) -> Address:
    sync(local_cache, s3)
    return s3
