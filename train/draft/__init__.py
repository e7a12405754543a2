"""Kinds of drafts. Other packages use a kind only through its `DraftKind`."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, MutableMapping
from typing import TYPE_CHECKING

from pipeline.lazy import lazy_exports
from train.draft.dflash.settings import DFLASH_TABLES
from train.draft.dflash2.settings import DFLASH2_TABLES
from train.draft.dspark.settings import DSPARK_TABLES
from train.draft.eagle3.settings import EAGLE3_TABLES
from train.draft.tables import KindTables

if TYPE_CHECKING:
    from train.draft.kind import DraftKind

TABLES: dict[str, KindTables] = {
    e.name: e for e in (DSPARK_TABLES, DFLASH_TABLES, DFLASH2_TABLES, EAGLE3_TABLES)
}
"""Settings of the kinds, by their name in `draft.kind`; the first is the default. A new kind adds a row."""


class _Kinds(MutableMapping[str, "DraftKind"]):
    """Kinds by name. Each is imported when it is asked for: its classes need torch."""

    def __init__(self) -> None:
        self._imported: dict[str, DraftKind] = {}

    def __getitem__(self, name: str) -> DraftKind:
        if name not in self._imported:
            module, _, attribute = TABLES[name].kind.partition(":")
            self._imported[name] = getattr(importlib.import_module(module), attribute)
        return self._imported[name]

    def __setitem__(self, name: str, kind: DraftKind) -> None:
        self._imported[name] = kind

    def __delitem__(self, name: str) -> None:
        del self._imported[name]

    def __iter__(self) -> Iterator[str]:
        return iter(TABLES)

    def __len__(self) -> int:
        return len(TABLES)


DRAFTS = _Kinds()
"""Kinds by their name in `draft.kind`."""

__getattr__, __all__ = lazy_exports(
    __name__,
    {
        "AcceptRatePredictor": "train.draft.dspark.confidence",
        "DSparkForwardOutput": "train.draft.dspark.model",
        "Qwen3DSparkModel": "train.draft.dspark.model",
        "draft_config": "train.draft.dspark.config",
    },
)
