"""Postpone imports that take seconds, such as torch's, until something needs them."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any


def lazy_exports(package: str, table: dict[str, str]) -> tuple[Callable[[str], Any], list[str]]:
    """Return a package's `__getattr__` (PEP 562) and `__all__` that import `{name: module}` on first use."""

    def __getattr__(name: str) -> Any:  # noqa: N807
        if name not in table:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(table[name]), name)

    return __getattr__, sorted(table)


class LazyModule:
    """A stand-in for a module, which it imports when one of its attributes is first read."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        value = getattr(import_module(self._name), attribute)
        setattr(self, attribute, value)  # later reads find it without this function
        return value
