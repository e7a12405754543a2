"""Stage 1: run the frozen target once and write a cache of what drafts need."""

from pipeline.lazy import lazy_exports

__getattr__, __all__ = lazy_exports(
    __name__,
    {
        "DFlashTargetBatch": "capture.target",
        "DSparkTargetBatch": "capture.target",
        "HFDFlashTargetModel": "capture.target",
        "HFDSparkTargetModel": "capture.target",
    },
)
