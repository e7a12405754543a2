"""Loss terms over supervised slots: the definition, and the pass over the vocabulary."""

from pipeline.lazy import lazy_exports

# The documented paths of what lives with the DSpark draft.
__getattr__, __all__ = lazy_exports(
    __name__,
    {"DSparkStepMetrics": "train.draft.dspark.loss", "compute_dspark_loss": "train.draft.dspark.loss"},
)
