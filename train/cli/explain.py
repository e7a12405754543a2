"""Table of all settings of a run, for the terminal."""

from __future__ import annotations

import dataclasses
import shutil
import textwrap
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from pipeline.config import field_docs, toml_value
from train.config import TrainConfig
from train.draft import TABLES


def explain(width: int | None = None) -> Iterator[str]:
    """Yield the lines of a table: each setting with its default, its published value and its meaning.

    Args:
        width: characters per line; None takes the terminal's width.
    """
    rows = [("setting", "default", "published", "meaning"), *_rows()]
    columns = [max(len(row[i]) for row in rows) for i in range(3)]
    width = width or shutil.get_terminal_size((110, 24)).columns
    room = max(30, width - sum(columns) - 6)
    for row in rows:
        first, *rest = textwrap.wrap(row[3], room) or [""]
        yield "  ".join([text.ljust(column) for text, column in zip(row, columns, strict=False)] + [first])
        yield from (" " * (sum(columns) + 6) + line for line in rest)


def _rows() -> Iterator[tuple[str, str, str, str]]:
    """Yield the rows of all kinds: what each has for itself, then what they share."""
    for kind in TABLES.values():
        yield from _table("draft", kind.draft, kind.published)
        yield from _table("loss", kind.loss, kind.published)
    yield from _table("train", TrainConfig, next(iter(TABLES.values())).published)


def _table(table: str, cls: type, published: Mapping[str, str]) -> Iterator[tuple[str, str, str, str]]:
    types, docs = typing.get_type_hints(cls), field_docs(cls)
    for field in dataclasses.fields(cls):
        name = f"{table}.{field.name}"
        default = "" if field.default is None else toml_value(field.default)
        yield name, default, published.get(name, ""), docs[field.name] + _choices(types[field.name])


def _choices(hint: Any) -> str:
    """Return a sentence with a setting's allowed words; an empty string if it is not limited to words."""
    if typing.get_origin(hint) is typing.Literal:
        return f" One of {', '.join(typing.get_args(hint))}."
    several = [_choices(part) for part in typing.get_args(hint)]
    return max(several, default="").replace("One of", "Any of")
