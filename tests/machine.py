"""The processor's bf16 as the tests are to believe it: the truth, or the answer that is forced.

`--dtype auto` and `train.precision=auto` ask whether the CPU multiplies bf16 matrices, and go on in bf16 or
in fp32. A test that passes through that question is marked `capability`; `make test-flipped` runs those once
more as if the machine were of the other kind.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

_FORCED = "DSPARK_TEST_BF16"  # yes, no, flip; unset: the truth
_NOTES = "DSPARK_TEST_ASKED"  # a file that grows by a byte each time somebody asks
_ANSWERS = ("avx512_bf16", "amx_bf16", "bf16")
_capabilities: Callable[[], dict[str, Any]] = getattr(torch.cpu, "get_capabilities", dict)


def truth() -> bool:
    """Return whether this processor multiplies bf16 matrices."""
    return any(_capabilities().get(name) for name in _ANSWERS)


def _answer(bf16: bool) -> dict[str, Any]:
    """Return what torch says of this processor, but for bf16."""
    return {**_capabilities(), **dict.fromkeys(_ANSWERS, bf16)}


def install() -> None:
    """Answer as the environment asks for, in this process, and note each time that somebody asks."""
    forced = os.environ.get(_FORCED, "truth")
    bf16 = {"truth": truth(), "yes": True, "no": False, "flip": not truth()}[forced]

    def asked() -> dict[str, Any]:
        if name := os.environ.get(_NOTES):
            note = os.open(name, os.O_WRONLY | os.O_APPEND)
            os.write(note, b".")
            os.close(note)
        return _answer(bf16)

    torch.cpu.get_capabilities = asked


def note_in(path: Path) -> None:
    """Let this process and those that it starts note in a file that they asked."""
    path.touch()
    os.environ[_NOTES] = str(path)


def times_asked() -> int:
    """Count the questions so far, here and in processes that tests forked."""
    return Path(os.environ[_NOTES]).stat().st_size


def pretend(patch: pytest.MonkeyPatch, bf16: bool) -> None:
    """Let one test have the answer that it means, on every machine."""
    patch.setattr(torch.cpu, "get_capabilities", lambda: _answer(bf16))


@contextmanager
def obeying_permissions() -> Iterator[None]:
    """Let the mode of a file bind this thread, and those that it starts, also where it is root's."""
    before = obey_permissions()
    try:
        yield
    finally:
        _allow(before)


def obey_permissions() -> int:
    """The same for good; returns what was allowed before."""
    before = _allowed()
    _allow(before & ~_ABOVE_PERMISSIONS)
    return before


# Linux' capget and capset: the version of their structures, this thread, and 64 bits each of what is in
# effect, permitted and inherited, low words first.
_ABOVE_PERMISSIONS = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
_HEADER, _Sets = (ctypes.c_uint32 * 2)(0x20080522, 0), ctypes.c_uint32 * 6


def _call(name: str, sets: ctypes.Array[ctypes.c_uint32]) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    assert getattr(library, name)(_HEADER, sets) == 0, os.strerror(ctypes.get_errno())


def _allowed() -> int:
    sets = _Sets()
    if sys.platform == "linux":
        _call("capget", sets)
    return sets[0]


def _allow(effective: int) -> None:
    if sys.platform == "linux":
        sets = _Sets()
        _call("capget", sets)
        sets[0] = effective
        _call("capset", sets)
