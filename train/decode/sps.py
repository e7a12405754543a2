"""Steps-per-second tables: how fast an engine's step over a batch of tokens is, as engines measured it.

SGLang writes them with `sglang.benchmark.dspark_sps_profiler`, over tokens alone or over requests and tokens;
TensorRT-LLM reads them as its confidence scheduler's cost table. A batch has a token per request and the
drafted tokens that are verified.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import files
from pipeline.errors import ConfigError

_LIMIT = 2**24
_LARGEST = 10**9
"""Of numbers in a table."""
_BELOW = -1e-12
"""Of numbers that may be 0."""


@dataclass(frozen=True)
class Curve:
    """Values over whole numbers that rise."""

    at: tuple[int, ...]
    values: tuple[float, ...]

    def below(self, place: int) -> float:
        """Return the value of the nearest number that is not above `place`, or the first one's."""
        return self.values[max(bisect_right(self.at, place) - 1, 0)]

    def between(self, place: int) -> float:
        """Return the value on the straight line between neighbours; outside, that of the end."""
        return float(np.interp(place, self.at, self.values))


@dataclass(frozen=True)
class StepTable:
    """An engine's steps per second."""

    form: str
    """Name of the file's form."""
    rate: Callable[[int, int], float]
    """Steps per second by requests and tokens of a batch."""
    most_tokens: int
    """Largest batch that was measured."""
    most_requests: int | None
    """Most requests that were measured; None where a step depends on tokens alone."""

    def require(self, requests: int, tokens: int, path: Path) -> None:
        """Check that batches up to this size were measured: beyond, engines take more tokens for free.

        Raises:
            ConfigError: they were not.
        """
        for what, most, wanted in (
            ("requests", self.most_requests, requests),
            ("tokens", self.most_tokens, tokens),
        ):
            if most is not None and wanted > most:
                raise ConfigError(
                    f"--sps {path} ends at {most:,} {what} in a batch, and {requests:,} requests make "
                    f"batches of up to {wanted:,}: lower --requests, or measure larger batches"
                )


def read_sps(path: Path) -> StepTable:
    """Read a table of SGLang's or TensorRT-LLM's; its keys tell which.

    Raises:
        ConfigError: the file can't be read, is of neither form, or breaks a rule of its form.
    """
    try:
        values = json.loads(files.read_small(path.resolve(), _LIMIT), parse_constant=str)
        if not isinstance(values, dict):
            raise ValueError("it is no JSON object")
        for key, build in _FORMS.items():
            if key in values:
                return build(values)
        known = " or ".join(_FORMS)
        raise ValueError(f"it has none of the keys that tell the form, {known}")
    except (OSError, ValueError, RecursionError) as error:
        said = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"--sps {path} is no steps-per-second table ({said}): pass one that SGLang's "
            "dspark_sps_profiler wrote, or a cost table of TensorRT-LLM's"
        ) from None


def _by_tokens(values: Mapping[str, Any]) -> StepTable:
    """Read SGLang's table over tokens. It looks down to the nearest measured batch, so this does."""
    curve = _curve(values, "sample_batch_tokens", "sample_steps_per_sec", lowest=0, least=1)
    return StepTable("SGLang", lambda _requests, tokens: curve.below(tokens), curve.at[-1], None)


def _in_seconds(values: Mapping[str, Any]) -> StepTable:
    """Read SGLang's sum of a constant and fitted parts by requests and by tokens. These may be negative."""
    constant = _number(values["bias_seconds"], "bias_seconds", 0)
    by_requests = _curve(values, "bs_probes", "alpha_seconds", lowest=-_LARGEST)
    by_tokens = _curve(values, "m_probes", "theta_seconds", lowest=-_LARGEST)
    if constant + min(by_requests.values) + min(by_tokens.values) <= 0:
        raise ValueError("bias_seconds, alpha_seconds and theta_seconds add up to steps that take no time")
    return _sum("SGLang, by requests and tokens", constant, by_requests, by_tokens, unit=1.0)


def _in_milliseconds(values: Mapping[str, Any]) -> StepTable:
    """Read TensorRT-LLM's sum; only the part by tokens must be there."""
    constant = _number(values.get("fixed_overhead_ms", 0.0), "fixed_overhead_ms", _BELOW)
    by_tokens = _curve(values, "token_counts", "step_time_ms", lowest=0)
    by_requests = None
    if values.get("batch_sizes") or values.get("batch_overhead_ms"):
        by_requests = _curve(values, "batch_sizes", "batch_overhead_ms", lowest=_BELOW)
    return _sum("TensorRT-LLM", constant, by_requests, by_tokens, unit=1e-3)


_FORMS: dict[str, Callable[[Mapping[str, Any]], StepTable]] = {
    "sample_batch_tokens": _by_tokens,
    "bias_seconds": _in_seconds,
    "token_counts": _in_milliseconds,
}
"""The key that tells a form, and its reader."""


def _sum(form: str, constant: float, by_requests: Curve | None, by_tokens: Curve, unit: float) -> StepTable:
    """Make a table of times that add up, in `unit` seconds."""

    def rate(requests: int, tokens: int) -> float:
        own = by_requests.between(requests) if by_requests else 0.0
        return 1 / (unit * (constant + own + by_tokens.between(tokens)))

    return StepTable(form, rate, by_tokens.at[-1], by_requests.at[-1] if by_requests else None)


def _curve(values: Mapping[str, Any], at: str, of: str, *, lowest: float, least: int = 0) -> Curve:
    """Read two lists of one length: whole numbers that rise, and a value at each.

    Args:
        lowest: values must be above it.
        least: the first of the whole numbers must not be below it.
    """
    places, found = _list(values, at), _list(values, of)
    if len(places) != len(found):
        raise ValueError(f"{at} has {len(places)} numbers, and {of} {len(found)}")
    for place in places:
        if type(place) is not int or not least <= place <= _LARGEST:
            raise ValueError(f"{at} expects whole numbers from {least}, got {_short(place)}")
    if any(b <= a for a, b in pairwise(places)):
        raise ValueError(f"{at} does not rise from number to number")
    return Curve(tuple(places), tuple(_number(value, of, lowest) for value in found))


def _list(values: Mapping[str, Any], name: str) -> list[Any]:
    found = values.get(name)
    if not isinstance(found, list) or not found:
        raise ValueError(f"{name} expects a list of numbers, got {_short(found)}")
    return found


def _number(value: Any, name: str, lowest: float) -> float:
    if type(value) not in (int, float) or not lowest < value < _LARGEST:
        bound = {0: " above 0", _BELOW: " from 0"}.get(lowest, "")
        raise ValueError(f"{name} expects numbers{bound}, got {_short(value)}")
    return float(value)


def _short(value: Any) -> str:
    return "nothing" if value is None else repr(value)[:40]
