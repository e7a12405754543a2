"""Fields that the format gained later, and the plain values that JSON stores of a record.

Such a field is not written while it has its default value. So files that do not need it keep their bytes, and
a version that does not know it reads them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

LEFT_OUT = {"left_out": True}
"""Metadata of such a field, as in `field(default=None, metadata=LEFT_OUT)`."""


def plain_values(record: Any) -> dict[str, Any]:
    """Return a dataclass as JSON's values, like `dataclasses.asdict`, without fields that are left out.

    Dataclasses inside are converted too, and tuples of them.
    """
    fields = [f for f in dataclasses.fields(record) if not _is_left_out(f, getattr(record, f.name))]
    return {field.name: _plain(getattr(record, field.name)) for field in fields}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return plain_values(value)
    if isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
        return tuple(map(_plain, value))
    return value


def _is_left_out(field: dataclasses.Field, value: Any) -> bool:
    """Return whether a field that may be left out has its default."""
    if not field.metadata.get("left_out"):
        return False
    made = field.default_factory is not dataclasses.MISSING
    return value == (field.default_factory() if made else field.default)
