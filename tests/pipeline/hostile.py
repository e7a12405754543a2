"""What the tests of hostile files share.

Every rule of FORMAT.md that a file can break is broken in one of them, one file each, and must be refused
in one line. The files are made by hand and consistent in everything but the rule they break: a file table
that is wrong about a size would be refused for that, and hide whether the rule itself is kept.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.errors import CacheError
from tests.pipeline.handmade import HandCache
from tests.pipeline.written import read_all

Bend = Callable[[HandCache], None]


def assert_refuses(path: Path, action: Callable[[Path], object] = read_all) -> str:
    with pytest.raises(CacheError) as caught:
        action(path)
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    assert len(message) < 3000, f"a message of {len(message)} characters: {message[:200]}..."
    return message


def lengthen(data: bytes, claimed: int) -> bytes:
    return struct.pack("<Q", claimed) + data[8:]
