"""The grid of a sweep: a point for every combination of configs and values, and a name for each."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline import config as configuration
from pipeline.errors import ConfigError, UsageError
from train.config import RunConfig
from train.draft.settings import run_config, tables_of

_LONGEST_NAME = 200  # bytes; file systems end at 255, and the log's name is longer
# A whole quoted string, or one character.
_TOKEN = re.compile(r"""'[^']*'|"(?:[^"\\]|\\.)*"|.""", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Point:
    """One run of the grid."""

    name: str
    """The name of its directory."""
    file: Path
    """The config file."""
    settings: tuple[str, ...]
    """The settings that `dspark train` gets with --set."""
    config: RunConfig
    """The config file with these settings."""


def split_values(text: str) -> list[str]:
    """Split at the commas outside brackets and quotes. Raise UsageError if these do not close."""
    values, depth = [""], 0
    for token in _TOKEN.findall(text):
        depth += (token in ("[", "{")) - (token in ("]", "}"))
        if token in ("'", '"') or depth < 0:
            break
        if token == "," and not depth:
            values.append("")
        else:
            values[-1] += token
    else:
        if not depth:
            return [value.strip() for value in values]
    raise UsageError(f"a bracket or a quote is not closed in {text!r}: close it, or leave it out")


def parse_settings(settings: Iterable[str]) -> dict[str, list[str]]:
    """Return the values of every --set by key, in the order given.

    Raises:
        UsageError: a setting has no key, no value, an empty value, or one that was given before.
    """
    grid: dict[str, list[str]] = {}
    for setting in settings:
        key, sign, text = setting.partition("=")
        key = key.strip()
        if not sign or not key:
            raise UsageError(f"expected --set table.key=value or table.key=value,value,..., got {setting!r}")
        if key in grid:
            raise UsageError(f"--set {key} is given twice: give all its values to one, separated by commas")
        values = split_values(text)
        if "" in values:
            raise UsageError(f"--set {setting}: expected values separated by single commas, got an empty one")
        for value, count in Counter(values).items():
            if count > 1:
                raise UsageError(f"--set {setting}: expected different values, got {value} {count} times")
        grid[key] = values
    return grid


def run_names(grid: dict[str, list[str]], first: str = "") -> list[str]:
    """Name every point of a grid by the settings that vary. The first key varies slowest.

    Names are safe as file names. They do not change when a key that varies gets more values.

    Args:
        first: what every name begins with, such as the name of a config.
    """
    varied = [key for key, values in grid.items() if len(values) > 1]
    if not varied:
        return [first or "run"]
    tails = [key.rpartition(".")[2] for key in varied]
    short = [tail if tails.count(tail) == 1 else key for key, tail in zip(varied, tails, strict=True)]
    choices = list(itertools.product(*(grid[key] for key in varied)))
    plain = [
        ",".join(
            [first] * bool(first)
            + [f"{_safe(key)}={_safe(value)}" for key, value in zip(short, choice, strict=True)]
        )
        for choice in choices
    ]
    times = Counter(plain)
    return [
        name
        if times[name] == 1 and len(name.encode()) <= _LONGEST_NAME
        else f"{name[: _LONGEST_NAME // 4]}~{hashlib.sha256(repr(choice).encode()).hexdigest()[:8]}"
        for name, choice in zip(plain, choices, strict=True)
    ]


def _safe(text: str) -> str:
    """Return a part of a file name: without brackets and quotes, with a dash for other unusual characters."""
    return re.sub(r"[^\w.+-]+", "-", re.sub(r"""[]["'{}]""", "", text))


def config_names(files: Sequence[Path]) -> list[str]:
    """Return what configs are called in the names of their runs: their files' stems, nothing for one alone.

    Raises:
        UsageError: two files have the same stem.
    """
    if len(files) == 1:
        return [""]
    names: dict[str, Path] = {}
    for file in files:
        name = _safe(file.stem)[: _LONGEST_NAME // 4]
        if name in names:
            raise UsageError(
                f"configs {names[name]} and {file} would give their runs the same name, {name}: pass "
                "files with different names, each once"
            )
        names[name] = file
    return list(names)


def plan_grid(files: Sequence[Path], settings: Iterable[str]) -> list[Point]:
    """Return every run of a sweep, with its config built and checked. The config varies slowest.

    Args:
        files: configs, the runs of each named by its stem if there are several.
        settings: of every config, as --set takes them.

    Raises:
        UsageError: a setting is wrong. The message names the run if the setting suits others.
    """
    grid = parse_settings(settings)
    points: list[Point] = []
    names: dict[RunConfig, str] = {}
    for file, first in zip(files, config_names(files), strict=True):
        values = configuration.load_toml(file)
        for name, choice in zip(run_names(grid, first), itertools.product(*grid.values()), strict=True):
            chosen = tuple(f"{key}={value}" for key, value in zip(grid, choice, strict=True))
            try:
                tables = configuration.apply_overrides(values, chosen)
                chosen += tables_of(tables, str(file)).implied(grid, tables.get("draft", {}))
                config = run_config(configuration.apply_overrides(values, chosen), str(file))
            except ConfigError as error:
                raise ConfigError(f"grid point {name}: {error}") from None
            if config in names:
                raise UsageError(
                    f"grid points {names[config]} and {name} are the same run: drop one of "
                    f"{'the values' if first == '' else 'the configs or values'}"
                )
            names[config] = name
            points.append(Point(name=name, file=file, settings=chosen, config=config))
    return points
