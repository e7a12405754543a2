"""The files of a draft's figures: they lie beside it in its checkpoint's folder, and go when it goes.

They are read as manifests are, through `pipeline.config.build`. Unknown keys are skipped: a newer version may
have added them. A number that is not finite, or that nothing real comes near, fits no field.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from pipeline import files
from pipeline.config import build
from pipeline.errors import ConfigError, RunError
from train.runs.figures import Calibration, Evaluation, Speculation
from train.runs.names import CALIBRATION, EVALUATION, SPECULATION

LARGEST = 1e100
"""Of figures: what is larger is a mistake, and can't be drawn."""
_LEFT_OUT = ("further_losses", "lengths")
"""Keys that are left out of a file where there is nothing, as files of earlier versions lack them."""
_LIMIT = 16 * 2**20
_Figures = TypeVar("_Figures", Evaluation, Calibration, Speculation)
_FILES = {Evaluation: EVALUATION, Calibration: CALIBRATION, Speculation: SPECULATION}


def save_figures(folder: Path, figures: Evaluation | Calibration | Speculation) -> None:
    """Put figures beside the draft that they are of. Raises WriteError where that can't be written."""
    text = json.dumps(json_values(figures), indent=1) + "\n"
    files.publish_bytes(folder / _FILES[type(figures)], text.encode())


def json_values(figures: Evaluation | Calibration | Speculation) -> dict[str, Any]:
    """Return figures as the values of their file."""
    return _without_empty(asdict(figures))


def _without_empty(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_empty(v) for k, v in value.items() if v or k not in _LEFT_OUT}
    return [_without_empty(item) for item in value] if isinstance(value, list | tuple) else value


def read_evaluation(folder: Path, *, skip_misfits: bool = False) -> Evaluation | None:
    """Read the evaluation beside a draft; None where nobody made one.

    Args:
        folder: of the draft's checkpoint.
        skip_misfits: read values of a wrong type as not measured, or the whole file where it needs them.

    Raises:
        RunError: the file can't be read, or has a value of a wrong type.
    """
    return _read(folder, Evaluation, skip_misfits)


def read_calibration(folder: Path, *, skip_misfits: bool = False) -> Calibration | None:
    """Read the calibration beside a draft; arguments and errors as of `read_evaluation`."""
    return _read(folder, Calibration, skip_misfits)


def read_speculation(folder: Path, *, skip_misfits: bool = False) -> Speculation | None:
    """Read the figures of live decoding beside a draft; arguments and errors as of `read_evaluation`."""
    return _read(folder, Speculation, skip_misfits)


def read_temperatures(folder: Path, slots: int) -> tuple[float, ...] | None:
    """Read the confidence head's temperatures beside a draft; None where none were fitted.

    Args:
        folder: of the draft's checkpoint.
        slots: K, one temperature each.

    Raises:
        RunError: the file does not have K positive numbers.
    """
    path = folder / CALIBRATION
    if not path.is_file():
        return None
    found = read_calibration(folder, skip_misfits=True)
    if found is None or len(found.temperatures) != slots or min(found.temperatures) <= 1e-6:
        raise RunError(f"{path} has not {slots} positive temperatures: run `dspark calibrate` again")
    return found.temperatures


def as_evaluation(values: dict[str, Any]) -> Evaluation | None:
    """Build an evaluation from training's own; None if its figures are not finite."""
    return _build(Evaluation, json.loads(json.dumps(values), **_NUMBERS), "evaluation", skip_misfits=True)


def _read(folder: Path, cls: type[_Figures], skip_misfits: bool) -> _Figures | None:
    path = folder / _FILES[cls]
    if not path.is_file():
        return None
    try:
        values = json.loads(files.read_small(path, _LIMIT), **_NUMBERS)
        if not isinstance(values, dict):
            raise ValueError("no object")
        return _build(cls, values, path.stem, skip_misfits)
    except (OSError, ValueError, RecursionError, ConfigError) as error:
        raise RunError(f"{path} can't be read ({error}): remove it, and measure again") from None


def _build(cls: type[_Figures], values: dict[str, Any], where: str, skip_misfits: bool) -> _Figures | None:
    try:
        return build(cls, values, where, skip_unknown=True, skip_misfits=skip_misfits)
    except ConfigError:
        if not skip_misfits:
            raise
        return None


def _figure(kind: type[int] | type[float]) -> Callable[[str], float | str]:
    """Make a parser of JSON's numbers; what is no figure stays text, which fits no field of a number."""

    def parse(text: str) -> float | str:
        value = kind(text)
        return value if -LARGEST < value < LARGEST else text

    return parse


_NUMBERS = {"parse_int": _figure(int), "parse_float": _figure(float), "parse_constant": str}
