"""Kinds of drafts. Other packages use a kind only through its `DraftKind`."""

from pipeline.lazy import lazy_exports
from train.draft.dflash.kind import DFLASH
from train.draft.dspark.kind import DSPARK
from train.draft.kind import DraftKind

DRAFTS: dict[str, DraftKind] = {"dspark": DSPARK, "dflash": DFLASH}
"""Kinds by their name in `draft.kind`; the first is the default."""

__getattr__, __all__ = lazy_exports(
    __name__,
    {
        "AcceptRatePredictor": "train.draft.dspark.confidence",
        "DSparkForwardOutput": "train.draft.dspark.model",
        "Qwen3DSparkModel": "train.draft.dspark.model",
        "draft_config": "train.draft.dspark.config",
    },
)
