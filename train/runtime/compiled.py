"""Compile functions on first use: loading the compiler takes seconds, which most CPU runs save."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch


@cache
def compiled(function: Callable[..., Any], *, dynamic: bool = True) -> Callable[..., Any]:
    """Return the compiled function. All callers share one compilation.

    Args:
        dynamic: compile once for all shapes; False for those sizes only that a caller marks as dynamic.
    """
    return torch.compile(function, dynamic=dynamic)
