"""Stage 2: train drafts from a cache. Never loads the target."""

from pipeline.lazy import lazy_exports

__getattr__, __all__ = lazy_exports(
    __name__,
    {
        "AcceptRatePredictor": "train.draft.dspark.confidence",
        "DSparkForwardOutput": "train.draft.dspark.model",
        "DSparkStepMetrics": "train.draft.dspark.module",
        "DSparkTrainerModule": "train.draft.dspark.module",
        "Qwen3DSparkModel": "train.draft.dspark.model",
        "build_anchor_candidate_mask": "train.draft.blocks.anchors",
        "build_eval_mask": "train.draft.blocks.anchors",
        "compute_dspark_loss": "train.draft.dspark.loss",
        "create_noise_embed": "train.draft.blocks.anchors",
        "create_position_ids": "train.draft.blocks.anchors",
        "sample_anchor_positions": "train.draft.blocks.anchors",
    },
)
