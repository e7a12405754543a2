"""The documented path of `train.draft.dspark.module`."""

from train.draft.dspark.module import DSparkStepMetrics, DSparkTrainerModule

__all__ = ["DSparkStepMetrics", "DSparkTrainerModule"]
