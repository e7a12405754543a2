"""The search space of a tune: ranges and choices of settings, as text, and the settings of a trial."""

from __future__ import annotations

import math
import tomllib
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from pipeline import config as configuration
from pipeline.errors import ConfigError, UsageError
from train.config import RunConfig
from train.draft.settings import run_config, tables_of
from train.experiments.grid import split_values
from train.runs.changes import LENGTH, flat_settings

_FORM = "TABLE.KEY=LOW..HIGH or TABLE.KEY=VALUE,VALUE,..."
_DIGITS = 3
"""Significant digits of a drawn number: more would say nothing."""
_FIXED = (
    *LENGTH,
    "train.eval_every",
    "train.early_stopping_patience",
    "train.held_out",
    "train.eval_anchors",
    "train.seed",
    "draft.kind",
)
"""Settings that a tune sets itself, or that decide what the figures of trials are compared on."""


class Drawer(Protocol):
    """The part of an optuna trial that draws values."""

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int: ...

    def suggest_categorical(self, name: str, choices: Any) -> Any: ...


@dataclass(frozen=True)
class Searched:
    """A setting that is searched."""

    key: str
    """Dotted name."""
    text: str
    """The range or the choices, as given."""
    low: float = 0.0
    high: float = 0.0
    whole: bool = False
    """The setting takes whole numbers only."""
    choices: tuple[str, ...] = field(default=())
    """Values as `--set` takes them; empty for a range."""

    @property
    def log(self) -> bool:
        """True if the range is searched on a logarithmic scale: all that are above 0."""
        return self.low > 0

    @property
    def size(self) -> float:
        """Number of values that it can have."""
        return len(self.choices) or (self.high - self.low + 1 if self.whole else math.inf)

    def ends(self) -> list[str]:
        """Return the settings to check: both ends of the range, or every choice."""
        values = self.choices or (self._shown(self.low), self._shown(self.high))
        return [f"{self.key}={value}" for value in values]

    def draw(self, trial: Drawer) -> str:
        """Draw a value, or take the trial's own if it has one already. Return it as `--set` takes it."""
        if self.choices:
            value = trial.suggest_categorical(self.key, self.choices)
        elif self.whole:
            value = str(trial.suggest_int(self.key, int(self.low), int(self.high), log=self.log))
        else:
            value = self._shown(trial.suggest_float(self.key, self.low, self.high, log=self.log))
        return f"{self.key}={value}"

    def _shown(self, value: float) -> str:
        rounded = float(f"{value:.{_DIGITS}g}")
        return str(int(value)) if self.whole else repr(min(max(rounded, self.low), self.high))

    def place(self, value: Any) -> float | str | None:
        """Return the parameter that stands for a setting's value in the study; None if none does.

        Args:
            value: the setting as a config has it.
        """
        if self.choices:
            same = (text for text in self.choices if _parsed(text) == _plain(value))
            return next(same, None)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return value if number and self.low <= value <= self.high else None

    def with_base(self, value: Any) -> Searched:
        """Return the setting with a range that holds the base config's own number too."""
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if self.choices or not number or (value <= 0 < self.low):
            return self
        low, high = min(self.low, float(value)), max(self.high, float(value))
        if (low, high) == (self.low, self.high):
            return self
        return Searched(self.key, f"{low:g}..{high:g}", low, high, self.whole)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else "none" if value is None else value


def _parsed(text: str) -> Any:
    """Return a value as `apply_overrides` reads it."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text.strip()


def parse_search(text: str, base: RunConfig) -> Searched:
    """Read a range or choices of one setting.

    Raises:
        UsageError: it has another form, is no setting of the base config, or its type takes no range.
    """
    key, sign, values = (part.strip() for part in text.partition("="))
    if not sign or not key or not values:
        raise UsageError(f"expected --search {_FORM}, got {text!r}")
    known = flat_settings(base)
    if key not in known:
        try:  # for the nearest name
            run_config(configuration.apply_overrides(_tables(base), [f"{key}=0"]), "config")
        except ConfigError as error:
            raise UsageError(f"--search {text}: {error}") from None
        raise UsageError(f"--search {text}: there is no setting {key}: see dspark train --explain")
    if key in _FIXED:
        raise UsageError(
            f"--search {text}: {key} has to be the same in all trials, or they can't be compared: give it "
            "to --set"
        )
    if ".." in values and values[0] not in "\"'[":
        return _range(key, values, text, base)
    choices = split_values(values)
    if "" in choices or len(choices) < 2 or len(set(choices)) < len(choices):
        raise UsageError(
            f"--search {text}: expected two or more different values separated by single commas, or a range "
            "LOW..HIGH; a single value is given by --set"
        )
    return Searched(key, values, choices=tuple(choices))


def _range(key: str, values: str, text: str, base: RunConfig) -> Searched:
    ends = [_parsed(end) for end in values.split("..")]
    numbers = [end for end in ends if isinstance(end, int | float) and not isinstance(end, bool)]
    if len(ends) != 2 or len(numbers) != 2 or not all(map(math.isfinite, numbers)):
        raise UsageError(f"--search {text}: expected two numbers LOW..HIGH, as in 1e-4..1e-2, got {values}")
    if not numbers[0] < numbers[1]:
        raise UsageError(f"--search {text}: expected a range from low to high, got {values}")
    types = _types(key, base)
    if float not in types and int not in types:
        raise UsageError(f"--search {text}: {key} is not a number: list its values, separated by commas")
    whole = float not in types
    if whole and any(isinstance(number, float) for number in numbers):
        raise UsageError(f"--search {text}: {key} is a whole number, got {values}")
    return Searched(key, values, float(numbers[0]), float(numbers[1]), whole)


def _types(key: str, base: RunConfig) -> set[Any]:
    """Return the types that a setting takes."""
    table, _, name = key.partition(".")
    hint = typing.get_type_hints(type(getattr(base, table)))[name]
    return set(typing.get_args(hint)) or {hint}


def _tables(config: RunConfig) -> dict[str, Any]:
    return tomllib.loads(configuration.to_toml(config))


def parse_space(texts: Iterable[str], base: RunConfig) -> list[Searched]:
    """Read every `--search`. Raises UsageError as `parse_search` does, or if a setting is given twice."""
    space: dict[str, Searched] = {}
    for text in texts:
        searched = parse_search(text, base)
        if searched.key in space:
            raise UsageError(f"--search {searched.key} is given twice: give all its values to one")
        space[searched.key] = searched
    return list(space.values())


def default_space(base: RunConfig) -> list[Searched]:
    """Return what is searched for a kind of draft by default, widened to the base config's own numbers.

    A number that the base config has switched off, by "none" or a 0 outside its range, is not searched.
    """
    own = flat_settings(base)
    space = parse_space(tables_of({"draft": base.draft}).searched, base)
    off = [each.key for each in space if own[each.key] is None or (own[each.key] == 0 and each.low > 0)]
    return [each.with_base(own[each.key]) for each in space if each.key not in off]


def trial_config(base: RunConfig, settings: Iterable[str]) -> tuple[RunConfig, tuple[str, ...]]:
    """Return the base config with settings of a trial, and these with those that they imply.

    Raises:
        ConfigError: no run can have them together.
    """
    settings = tuple(settings)
    varied = [setting.partition("=")[0] for setting in settings]
    tables = configuration.apply_overrides(_tables(base), settings)
    settings += tables_of(tables).implied(varied, _given(tables.get("draft", {}), base, varied))
    return run_config(configuration.apply_overrides(_tables(base), settings), "trial"), settings


def _given(draft: Mapping[str, Any], base: RunConfig, varied: Iterable[str]) -> dict[str, Any]:
    """Return the settings of `[draft]` that are not defaults: those that a user may have made."""
    defaults = vars(type(base.draft)())
    kept = {key.partition(".")[2] for key in varied}
    return {key: value for key, value in draft.items() if key in kept or value != defaults.get(key)}


class _Known:
    """Drawn values of a trial, as a drawer."""

    def __init__(self, parameters: Mapping[str, Any]):
        self._parameters = parameters

    def suggest_float(self, name: str, *_: Any, **__: Any) -> Any:
        return self._parameters[name]

    suggest_int = suggest_categorical = suggest_float


def settings_of(space: Iterable[Searched], parameters: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the settings that drawn values stand for; without those of settings that were not drawn."""
    return tuple(each.draw(_Known(parameters)) for each in space if each.key in parameters)


def base_parameters(space: Iterable[Searched], base: RunConfig) -> dict[str, Any]:
    """Return the values that stand for the base config; without those of settings that it has otherwise."""
    own = flat_settings(base)
    places = {each.key: each.place(own[each.key]) for each in space}
    return {key: value for key, value in places.items() if value is not None}
