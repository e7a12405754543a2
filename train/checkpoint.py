"""A draft on disk: Hugging Face layout, without the embedding and head that the cache holds."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from pipeline import files
from pipeline.cache import CacheReader
from pipeline.errors import RunError
from train.draft.model import Qwen3DSparkModel

LATEST = "latest"
STATE = "dspark.json"
_FROZEN = ("embed_tokens.weight", "lm_head.weight")


def save_checkpoint(run: Path, step: int, model: Qwen3DSparkModel, state: dict[str, Any]) -> Path:
    """Write `RUN/checkpoints/step-N` through a temporary name, then point `RUN/latest` at it.

    Frozen embedding and head are left out: they are the target's, and every cache has them.
    """
    folder = run / "checkpoints" / f"step-{step:06d}"
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    frozen = {name for name in _FROZEN if not model.get_parameter(name).requires_grad}
    weights = {name: value for name, value in model.state_dict().items() if name not in frozen}
    model.save_pretrained(partial, state_dict=weights)
    (partial / STATE).write_text(json.dumps({"step": step, **state}, indent=1) + "\n")
    for path in partial.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    link = run / f".{LATEST}.partial"
    link.unlink(missing_ok=True)
    link.symlink_to(folder.relative_to(run))
    link.replace(run / LATEST)
    files.sync_directory(run)
    return folder


def load_checkpoint(run: Path, reader: CacheReader) -> tuple[Qwen3DSparkModel, dict[str, Any]]:
    """Load `RUN/latest` and put the cache's embedding and head in.

    Raises:
        RunError: no checkpoint there, or one trained for another target than the cache's.
    """
    folder = run / LATEST
    if not (folder / STATE).is_file():
        raise RunError(
            f"no finished checkpoint in {run}: expected {folder}; run `dspark train --run {run}` first"
        )
    state = json.loads((folder / STATE).read_text())
    identity = reader.manifest.identity.target
    if state["target_weights"] != identity.weights:
        raise RunError(
            f"{run} was trained for target {state['target_name']}, the cache {reader.path} holds "
            f"{identity.name} with other weights: evaluate it on a cache of its own target"
        )
    frozen = reader.frozen()
    model = Qwen3DSparkModel(Qwen3DSparkModel.config_class.from_pretrained(folder))
    from safetensors.torch import load_file

    weights = {**frozen, **load_file(folder / "model.safetensors")}
    model.load_state_dict({name: value.to(torch.float32) for name, value in weights.items()})
    for name in _FROZEN:
        model.get_parameter(name).requires_grad_(False)
    return model, state
