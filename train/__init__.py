"""Stage 2: train drafts from a cache. Never loads the target."""

from pipeline.lazy import lazy_exports

__getattr__, __all__ = lazy_exports(
    __name__,
    {
        "AcceptRatePredictor": "train.draft.confidence",
        "DSparkForwardOutput": "train.draft.model",
        "DSparkStepMetrics": "train.module",
        "DSparkTrainerModule": "train.module",
        "Qwen3DSparkModel": "train.draft.model",
        "build_anchor_candidate_mask": "train.anchors",
        "build_eval_mask": "train.anchors",
        "compute_dspark_loss": "train.losses",
        "create_noise_embed": "train.anchors",
        "create_position_ids": "train.anchors",
        "sample_anchor_positions": "train.anchors",
    },
)
