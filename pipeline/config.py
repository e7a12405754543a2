"""TOML to frozen dataclasses and back, with strict types and dotted overrides. Unknown keys are errors.

A configuration class is a keyword-only frozen dataclass whose fields are bool, int, float, str,
`Literal[...]`, `tuple[X, ...]`, `dict[str, X]`, `X | Y`, `X | None`, `Any`, or another such dataclass. It
checks its own values in `__post_init__` and raises ConfigError.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import dataclasses
import difflib
import inspect
import itertools
import json
import reprlib
import textwrap
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pipeline.errors import ConfigError

T = TypeVar("T")


def show(value: Any) -> str:
    """Return a value's text for an error message: one short line, however long or deep the value is."""
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = brief.maxlong = 60
    return brief.repr(value)


def load_toml(path: str | Path) -> dict[str, Any]:
    """Read a TOML file. Raises ConfigError if it is missing or not TOML."""
    path = Path(path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no config file at {path}: give --config a TOML file, see configs/") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} is not a readable TOML file: {error}") from None


def apply_overrides(values: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return `values` with `table.key=value` settings applied; values are TOML, bare words strings."""
    result = copy.deepcopy(values)
    for override in overrides:
        dotted, sign, text = override.partition("=")
        if not sign or not dotted.strip():
            raise ConfigError(f"expected --set table.key=value, got {override!r}")
        try:
            value = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            value = text.strip()
        *tables, key = dotted.strip().split(".")
        table = result
        for name in tables:
            table = table.setdefault(name, {})
            if not isinstance(table, dict):
                raise ConfigError(f"--set {override}: expected a table, {name} is a value")
        table[key] = value
    return result


def build(
    cls: type[T],
    values: dict[str, Any],
    where: str = "config",
    *,
    classes: Mapping[str, type] | None = None,
    skip_unknown: bool = False,
    skip_misfits: bool = False,
) -> T:
    """Build a configuration dataclass from plain values. A table may also be built already.

    Args:
        where: the name of `values` in messages.
        classes: subclasses to build for some fields, by the fields' names.
        skip_unknown: ignore keys that the class does not have, as a newer version's file may.
        skip_misfits: ignore values of a wrong type wherever the class can do without: a field with a default
            takes it, a field or an item that may be None is None, an entry of a dict and a table in a list
            are left out.

    Raises:
        ConfigError: on an unknown key (with the nearest known one), a wrong type or a bad value.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where}: expected a table, got {show(values)}")
    hints = typing.get_type_hints(cls) | dict(classes or {})
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in values:
        if key not in fields and not skip_unknown:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(fields)}"
            raise ConfigError(f"{where}: unknown key {show(key)}; {hint}")
    skip = {"skip_unknown": skip_unknown, "skip_misfits": skip_misfits}
    converted = {}
    for key in filter(fields.__contains__, values):
        with _ignored(skip_misfits and _has_default(fields[key])):
            converted[key] = _convert(hints[key], values[key], f"{where}.{key}", skip)
    missing = [key for key, field in fields.items() if key not in converted and not _has_default(field)]
    if missing:
        raise ConfigError(f"{where}: missing key {missing[0]!r}")
    try:
        return cls(**converted)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _has_default(field: dataclasses.Field) -> bool:
    missing = dataclasses.MISSING
    return field.default is not missing or field.default_factory is not missing


def _ignored(ignored: bool) -> contextlib.AbstractContextManager[None]:
    """Swallow a ConfigError, or let it pass."""
    return contextlib.suppress(ConfigError) if ignored else contextlib.nullcontext()


def _convert(hint: Any, value: Any, where: str, skip: dict[str, bool]) -> Any:
    if hint is Any:
        return value
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    misfits = skip["skip_misfits"]
    if origin in (typing.Union, types.UnionType):
        optional = type(None) in args
        if optional and (value is None or (value == "none" and str not in args)):
            return None
        *others, last = [arg for arg in args if arg is not type(None)]
        for inner in others:
            with contextlib.suppress(ConfigError):
                return _convert(inner, value, where, skip)
        with _ignored(misfits and optional):
            return _convert(last, value, where, skip)
        return None
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
        return build(hint, value, where, **skip)
    if origin is typing.Literal:
        if value not in args:
            raise ConfigError(f"{where}: expected one of {', '.join(map(str, args))}, got {show(value)}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where}: expected a list, got {show(value)}")
        if set(map(type, value)) <= {args[0]}:  # a column of plain values, perhaps a hundred thousand
            return tuple(value)
        items = []
        for item in value:
            with _ignored(misfits and dataclasses.is_dataclass(args[0])):
                items.append(_convert(args[0], item, where, skip))
        return tuple(items)
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where}: expected a table, got {show(value)}")
        entries = {}
        for key, item in value.items():
            with _ignored(misfits):
                entries[key] = _convert(args[1], item, f"{where}.{show(key)[1:-1]}", skip)
        return entries
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise ConfigError(
                f"{where}: expected a number in the range of float, got {show(value)}"
            ) from None
    if type(value) is not hint:
        raise ConfigError(f"{where}: expected {hint.__name__}, got {show(value)}")
    return value


def field_docs(cls: type) -> dict[str, str]:
    """Return the docstring under each field of a configuration class, by the field's name.

    Fields that a class inherits come first, in the order of the dataclass; its own docstrings replace theirs.
    """
    docs: dict[str, str] = {}
    for each in reversed([base for base in cls.__mro__ if dataclasses.is_dataclass(base)]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
        assert isinstance(tree, ast.ClassDef)
        for field, after in itertools.pairwise(tree.body):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                match after:
                    case ast.Expr(value=ast.Constant(value=str(text))):
                        docs[field.target.id] = text
    return docs


def to_toml(config: Any) -> str:
    """Format a configuration as TOML, one table deep. None is omitted, or "none" if it is not the default."""
    lines = []
    for table in dataclasses.fields(config):
        lines.append(f"[{table.name}]")
        for field in dataclasses.fields(getattr(config, table.name)):
            value = getattr(getattr(config, table.name), field.name)
            if value is not None or field.default is not None:
                lines.append(f"{field.name} = {toml_value(value)}")
        lines.append("")
    return "\n".join(lines)


def toml_value(value: Any) -> str:
    """Format a value as TOML; None is "none"."""
    if value is None:
        return '"none"'
    if isinstance(value, float):
        return repr(value)  # inf and nan are TOML, Infinity is not
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    # JSON's strings, integers and booleans are valid TOML, except that TOML forbids a raw DEL.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
