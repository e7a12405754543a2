"""A trained draft opened for use: one of a run's checkpoints, on a cache of its target."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.cache import CacheReader
from train.config import RunConfig
from train.draft.dspark.module import DSparkTrainerModule
from train.eval.validate import split
from train.runs.checkpoint import BEST, find_checkpoint, load_checkpoint
from train.runs.directory import load_run_config
from train.runtime.distributed import Ranks
from train.trainer.setup import prepare, trainer_module


@dataclass(frozen=True)
class OpenedDraft:
    """A draft with its objective on a device, and the held-out samples it was never trained on."""

    folder: Path
    """Of the checkpoint; figures of the draft lie in it."""
    page: dict[str, Any]
    """Its training.json."""
    config: RunConfig
    reader: CacheReader
    module: DSparkTrainerModule
    held_out: np.ndarray
    """Sample numbers."""

    @property
    def step(self) -> int:
        """The optimiser step that the draft was saved at."""
        return self.page["progress"]["step"]


def open_draft(cache: Path, run: Path, ranks: Ranks, checkpoint: str = BEST) -> OpenedDraft:
    """Load a draft and the cache it is to be measured on.

    Args:
        checkpoint: as `train.runs.checkpoint.find_checkpoint` takes it.

    Raises:
        DSparkError: no such run, checkpoint or cache, or they do not belong together.
    """
    config = load_run_config(run)
    if ranks.device.type != "cuda":  # where it was trained may not be here
        config = replace(config, draft=replace(config.draft, attention="auto"))
    folder = find_checkpoint(run, checkpoint)
    reader = CacheReader(cache)
    reader.check_shards()
    model, page = load_checkpoint(folder, reader)
    reader.require_layers(model.config.target_layer_ids)
    _, held_out = split(reader, config.train.held_out)
    module = trainer_module(model.to(ranks.device), config)
    prepare(module, config, ranks.device)
    return OpenedDraft(folder, page, config, reader, module, held_out)
