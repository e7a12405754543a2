"""Loss terms over supervised slots: the definition, and the pass over the vocabulary."""

from pipeline.lazy import lazy_exports

__getattr__, __all__ = lazy_exports(
    __name__, {"DSparkStepMetrics": "train.losses.slots", "compute_dspark_loss": "train.losses.slots"}
)
