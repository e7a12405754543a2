"""Settings of a run, with the tables of its kind of draft."""

from __future__ import annotations

from typing import Any

from pipeline import config as configuration
from pipeline.config import show
from pipeline.errors import ConfigError
from train.config import DraftConfig, RunConfig
from train.draft import TABLES
from train.draft.tables import KindTables


def tables_of(values: Any, where: str = "config") -> KindTables:
    """Return the tables of the kind of draft that a run asks for; by default of the first kind.

    Raises:
        ConfigError: there is no such kind.
    """
    draft = values.get("draft", {}) if isinstance(values, dict) else {}
    name = next(iter(TABLES))
    if isinstance(draft, dict):
        name = draft.get("kind", name)
    elif isinstance(draft, DraftConfig):
        name = draft.kind
    if not isinstance(name, str) or name not in TABLES:
        raise ConfigError(f"{where}.draft.kind: expected one of {', '.join(TABLES)}, got {show(name)}")
    return TABLES[name]


def _check_owner(kind: KindTables, values: dict[str, Any], where: str) -> None:
    """Check that no setting is another kind's. Raise ConfigError if one is."""
    for table in ("draft", "loss"):
        given = values.get(table)
        for key in given if isinstance(given, dict) else ():
            owners = [e.name for e in TABLES.values() if key in getattr(e, table).__dataclass_fields__]
            if owners and kind.name not in owners:
                raise ConfigError(
                    f"{where}.{table}: unknown key {show(key)}; draft.kind is {kind.name}, and it is a "
                    f"setting of {', '.join(owners)}"
                )


def run_config(values: dict[str, Any], where: str = "config", *, skip_unknown: bool = False) -> RunConfig:
    """Build the settings of a run from plain values.

    Args:
        values: tables, as read from TOML or built already; absent ones have the kind's defaults.
        where: the name of `values` in messages.
        skip_unknown: ignore unknown keys, as a newer version's file may have.

    Raises:
        ConfigError: as in `pipeline.config.build`, or there is no such kind of draft.
    """
    kind = tables_of(values, where)
    if isinstance(values, dict) and not skip_unknown:
        _check_owner(kind, values, where)
    return configuration.build(
        RunConfig,
        {"draft": {}, "loss": {}, **values} if isinstance(values, dict) else values,
        where,
        classes={"draft": kind.draft, "loss": kind.loss},
        skip_unknown=skip_unknown,
    )
