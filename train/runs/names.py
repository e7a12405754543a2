"""The files of a run directory, and of the checkpoints in it.

RUN/config.toml           its settings, resolved
    run.json              the cache's identity, the code's version
    metrics.jsonl         an object per logged step
    trace.json            of --profile
    trackers.json         which run of a tracker this is
    tensorboard/, wandb/  what these trackers write
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

# In a checkpoint, beside config.json.
WEIGHTS = "model.safetensors"
STATES = "training.safetensors"
TRAINING = "training.json"
# Figures of its draft.
EVALUATION = "evaluation.json"
SPECULATION = "speculation.json"
CALIBRATION = "calibration.json"
