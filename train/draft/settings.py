"""Settings of a run, with the tables of its kind of draft."""

from __future__ import annotations

from typing import Any

from pipeline import config as configuration
from pipeline.config import show
from pipeline.errors import ConfigError
from train.config import DraftConfig, RunConfig
from train.draft import DRAFTS
from train.draft.kind import DraftKind


def kind_of(values: Any, where: str = "config") -> DraftKind:
    """Return the kind of draft that the tables of a run ask for; by default the first of the table.

    Raises:
        ConfigError: there is no such kind.
    """
    draft = values.get("draft", {}) if isinstance(values, dict) else {}
    name = next(iter(DRAFTS))
    if isinstance(draft, dict):
        name = draft.get("kind", name)
    elif isinstance(draft, DraftConfig):
        name = draft.kind
    if not isinstance(name, str) or name not in DRAFTS:
        raise ConfigError(f"{where}.draft.kind: expected one of {', '.join(DRAFTS)}, got {show(name)}")
    return DRAFTS[name]


def run_config(values: dict[str, Any], where: str = "config", *, skip_unknown: bool = False) -> RunConfig:
    """Build the settings of a run from plain values.

    Args:
        values: tables, as read from TOML or built already; absent ones have the kind's defaults.
        where: the name of `values` in messages.
        skip_unknown: ignore unknown keys, as a newer version's file may have.

    Raises:
        ConfigError: as in `pipeline.config.build`, or there is no such kind of draft.
    """
    kind = kind_of(values, where)
    own = {"draft": kind.settings, "loss": kind.loss}
    return configuration.build(
        RunConfig,
        {"draft": {}, "loss": {}, **values} if isinstance(values, dict) else values,
        where,
        classes=own,
        skip_unknown=skip_unknown,
    )
