"""Compile functions on first use: loading the compiler takes seconds, which most CPU runs save."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the compiled function, with dynamic shapes. All callers share one compilation."""
    return torch.compile(function, dynamic=True)
