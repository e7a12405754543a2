"""Checks of a released draft's config.json that do not depend on its kind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.errors import RunError


def check_architecture(values: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Check that a config names one of a kind's classes, or none.

    Args:
        values: values of config.json.
        known: names of the kind's classes.
        where: path of config.json, for messages.

    Raises:
        RunError: it names another class: its weights mean something else.
    """
    found = values.get("architectures", [known[0]])
    if found not in [[name] for name in known]:
        raise RunError(
            f"{where} has architectures = {found!r}, expected {' or '.join(known)}: it is another kind of "
            "draft, import another"
        )


def check_unquantized(values: Mapping[str, Any], where: str) -> None:
    """Check that a draft's weights are not quantised; arguments and errors as above."""
    if "quantization_config" in values:
        raise RunError(
            f"{where} has a quantization_config, expected unquantized weights: import the draft from before "
            "it was quantized"
        )
