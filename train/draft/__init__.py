"""The DSpark draft: a parallel block backbone, a Markov head and a confidence head."""

from pipeline.lazy import lazy_exports

__getattr__, __all__ = lazy_exports(
    __name__,
    {
        "AcceptRatePredictor": "train.draft.confidence",
        "DSparkForwardOutput": "train.draft.model",
        "Qwen3DSparkModel": "train.draft.model",
        "draft_config": "train.draft.config",
    },
)
