"""Triton for vLLM on a CPU: its interpreter in place of a compiler that PyPI does not have.

Runs in vLLM's environment, imported before vllm. The interpreter is slow, but computes what the kernels say.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import triton.language as tl
from triton.backends import backends
from triton.language.extra import libdevice
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


class _Driver:
    @staticmethod
    def is_active() -> bool:
        return True


class _Backend:
    driver = _Driver
    compiler = None


def _as_bool(mask: TensorHandle) -> TensorHandle:
    """Return a mask that loads and stores take: a block's and a scalar's `and` comes out as int8."""
    return mask if mask.data.dtype == np.bool_ else TensorHandle(mask.data.astype(np.bool_), mask.dtype)


def install() -> None:
    """Make vLLM believe in Triton on this CPU, and add what its interpreter lacks."""
    backends.setdefault("cpu", _Backend())
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    InterpreterBuilder.create_masked_load = lambda self, pointers, mask, *rest: load(
        self, pointers, _as_bool(mask), *rest
    )
    InterpreterBuilder.create_masked_store = lambda self, pointers, value, mask, *rest: store(
        self, pointers, value, _as_bool(mask), *rest
    )
    libdevice.log1p = lambda x, **_: tl.log(x + 1.0)
