"""Kinds of drafts. Other packages use a kind only through its `DraftKind`."""

from pipeline.lazy import lazy_exports
from train.draft.dflash.kind import DFLASH
from train.draft.dspark.kind import DSPARK
from train.draft.eagle3.kind import EAGLE3
from train.draft.kind import DraftKind

DRAFTS: dict[str, DraftKind] = {"dspark": DSPARK, "dflash": DFLASH, "eagle3": EAGLE3}
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
