"""Command-line options that several commands share. Importing this imports no torch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from pipeline.cache.codecs import CODECS
from pipeline.cache.features import ALL_TOKENS, LABELS, NO_LAST_HIDDEN
from pipeline.errors import UsageError
from pipeline.remote.address import Address, Place, parse_place

Command = Callable[..., Any]

CONTEXT_CODECS = tuple(CODECS)
LAST_CODECS = tuple(name for name, codec in CODECS.items() if codec.for_last)
# A third of the bytes of bf16. Its effect on drafts is measured in benchmarks/quality.py.
DEFAULT_CONTEXT_CODEC, DEFAULT_LAST_CODEC = "nf4", "int8"
# Last hidden states as the manifest names them: those after the final norm, or none.
LAST_HIDDEN_CHOICES = ("post_norm", NO_LAST_HIDDEN)
# Tokens whose last hidden states are stored, as the manifest names them.
HIDDEN_CHOICES = (LABELS, ALL_TOKENS)


class PlaceType(click.ParamType):
    """A path, or a URL of an object store."""

    name = "path or url"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Place:
        return parse_place(value) if isinstance(value, str) else value


class DirectoryType(PlaceType):
    """A path, for a command that takes no URL."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        place = super().convert(value, param, ctx)
        if isinstance(place, Address):
            raise UsageError(
                f"{place}: this command takes a directory: `dspark sync` copies caches to and from "
                "object stores"
            )
        return place


PLACE, DIRECTORY = PlaceType(), DirectoryType()


def check_last_codec(last_hidden: str | None, last_codec: str | None) -> None:
    """Refuse a codec for states that are left out. Raises UsageError.

    Args:
        last_hidden, last_codec: the options' values as given; None for an option that was not.
    """
    if last_hidden == NO_LAST_HIDDEN and last_codec is not None:
        raise UsageError(
            f"--last-hidden none stores no last hidden states, --last-codec {last_codec} says how: give "
            "one of them"
        )


def check_hidden(last_hidden: str | None, hidden: str | None) -> None:
    """Refuse more rows of states that are left out. Raises UsageError.

    Args:
        last_hidden, hidden: the options' values; None for one that was not given.
    """
    if last_hidden == NO_LAST_HIDDEN and hidden == ALL_TOKENS:
        raise UsageError(
            "--last-hidden none stores no last hidden states, --hidden all-tokens those of every token: give "
            "one of them"
        )


def parse_layer_ids(_ctx: click.Context, _param: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    """Parse `--layers`, as a click callback. Raises UsageError."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"--layers expects integers separated by commas, such as 1,9,17; got {text!r}"
        ) from None


def gathered(cls: type, name: str, options: list[Callable]) -> Callable[[Command], Command]:
    """Return a decorator that adds click options to a command and passes them as one `cls` named `name`."""

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def gather(*args: Any, **kwargs: Any) -> Any:
            values = {field.name: kwargs.pop(field.name) for field in fields(cls)}
            return command(*args, **{name: cls(**values)}, **kwargs)

        for option in reversed(options):
            gather = option(gather)
        return gather

    return decorate
