"""The DSpark draft: a parallel block backbone, a Markov head and a confidence head."""

from pipeline.lazy import lazy_exports

__getattr__, __all__ = lazy_exports(
    __name__,
    {
        "AcceptRatePredictor": "train.draft.dspark.confidence",
        "DSparkForwardOutput": "train.draft.dspark.model",
        "Qwen3DSparkModel": "train.draft.dspark.model",
        "draft_config": "train.draft.dspark.config",
    },
)
