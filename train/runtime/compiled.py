"""torch.compile, when it is first needed: loading the compiler takes seconds that a CPU run can save."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function compiled once for all callers, for any sizes."""
    return torch.compile(function, dynamic=True)
