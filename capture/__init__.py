"""Stage 1: run the frozen target once and write what a draft needs to disk."""

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
