"""Names of the files in a run directory and in its checkpoints.

RUN/config.toml           its settings, resolved
    run.json              the cache's identity, the code's version
    metrics.jsonl         an object per logged step
    trace.json            Chrome trace of --profile
    trackers.json         id that trackers know the run by
    tensorboard/, wandb/  files of these trackers
    checkpoints/step-N/   config.json and the files below
    latest, best          links to checkpoints
"""

from __future__ import annotations

CONFIG = "config.toml"
RUN = "run.json"
METRICS = "metrics.jsonl"
TRACE = "trace.json"
TRACKERS = "trackers.json"
TRACKER_FOLDERS = ("tensorboard", "wandb")
CHECKPOINTS = "checkpoints"
LATEST = "latest"
BEST = "best"

# In a checkpoint, next to config.json.
WEIGHTS = "model.safetensors"
STATES = "training.safetensors"
TRAINING = "training.json"
# Figures of a checkpoint's draft.
EVALUATION = "evaluation.json"
SPECULATION = "speculation.json"
CALIBRATION = "calibration.json"
