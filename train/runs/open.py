"""Open a trained draft, for evaluation, decoding and export."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from pipeline.cache import CacheReader, TargetIdentity
from pipeline.errors import RunError, UsageError
from pipeline.remote.address import Place
from train.config import RunConfig
from train.data.split import split
from train.data.store import open_cache
from train.draft import DRAFTS
from train.draft.kind import DraftKind, TrainerModule
from train.draft.vocabulary import check_d2t
from train.runs.checkpoint import FROZEN, check_shapes, checkpoints, copy_tensors, newest
from train.runs.directory import load_run_config
from train.runs.find import find_run
from train.runs.names import BEST, CHECKPOINTS, LATEST, TRAINING, WEIGHTS
from train.runs.page import TrainingPage, damaged, read_training
from train.runtime.distributed import Ranks


@dataclass(frozen=True)
class TrainedDraft:
    """A checkpoint's draft, read without a cache and without its target."""

    folder: Path
    """Folder of the checkpoint, which also holds figures of the draft."""
    page: TrainingPage
    shape: PretrainedConfig
    """The draft's Hugging Face config."""
    weights: dict[str, Tensor]
    """All weights but the target's embedding and head, checked to be finite."""

    @property
    def kind(self) -> DraftKind:
        """Kind of the draft."""
        return DRAFTS[self.page.config.draft.kind]

    @property
    def step(self) -> int:
        """Optimiser step that the draft was saved at."""
        return self.page.progress.step

    @property
    def target(self) -> TargetIdentity:
        """Target that the draft was trained for."""
        return self.page.cache.target

    def require_target_of(self, reader: CacheReader) -> None:
        """Check that a cache belongs to the draft's target. Raise RunError if not."""
        theirs = reader.manifest.identity.target
        if self.target.weights != theirs.weights:
            raise RunError(
                f"{self.folder} was trained for target {self.target.name}, but the cache {reader.place} "
                f"holds {theirs.name} with other weights: pass a --cache of the draft's target"
            )

    def model(self, reader: CacheReader | None = None) -> PreTrainedModel:
        """Build the draft in fp32, with frozen embedding and head.

        Args:
            reader: cache of the draft's target, which provides embedding and head. Without it both are
                random, and the caller must replace them.
        """
        model = self.kind.build(self.shape)
        copy_tensors(model, self.weights)
        if reader is not None:
            frozen = reader.frozen()
            model.initialize_embeddings_and_head(*(frozen[name] for name in FROZEN))
            own = {name: self.weights[name] for name in FROZEN if name in self.weights}
            copy_tensors(model, own)  # a head that is the draft's, over the target's
        for name in model.frozen:
            model.get_parameter(name).requires_grad_(False)
        return model


def find_checkpoint(run: Path, which: str = BEST) -> Path:
    """Return the folder of one of a run's checkpoints.

    Args:
        which: `latest`, `best` (the latest if nothing was held out) or a name such as `step-000400`.

    Raises:
        RunError: there is no such checkpoint.
    """
    folder = run / which if which in (LATEST, BEST) else run / CHECKPOINTS / which
    if which == BEST and not folder.exists():
        folder = run / LATEST
    if not (folder / TRAINING).is_file():
        names = ", ".join(path.name for path in checkpoints(run)) or "none"
        raise RunError(
            f"no finished checkpoint at {folder}: {run} has {names}; `dspark train --run {run}` makes them"
        )
    return folder.resolve()  # training may move the link


def run_to_continue(path: Path) -> Path:
    """Return the directory of the run that a path names, for training.

    Raises:
        UsageError: the path names a checkpoint that is not the newest.
    """
    named = find_run(path)
    folder = newest(named.path)
    if named.checkpoint and folder and find_checkpoint(named.path, named.checkpoint) != folder.resolve():
        raise UsageError(
            f"{path} is not the newest checkpoint of {named.path}, from which training continues: pass "
            f"--run {named.path}, or a new --run with --set draft.init_from={path}"
        )
    return named.path


def open_draft(run: Path, which: str = BEST) -> TrainedDraft:
    """Read one of a run's drafts.

    Args:
        which: as in `find_checkpoint`.

    Raises:
        RunError: there is no such checkpoint, it is damaged, or its weights are not finite.
    """
    folder = find_checkpoint(run, which)
    page = read_training(folder)
    kind = DRAFTS[page.config.draft.kind]
    try:
        shape = kind.config_class.from_pretrained(folder)
        missing = [name for name in kind.config_fields if not hasattr(shape, name)]
        if missing:
            raise ValueError(f"its config.json has no {missing[0]}")
        weights = load_file(folder / WEIGHTS)
        with torch.device("meta"):
            model = kind.build(shape)
        check_shapes(weights, {n: w.shape for n, w in model.state_dict().items() if n not in model.frozen})
        check_d2t(weights, shape.vocab_size)
    except Exception as error:  # transformers raises errors of many kinds for a config
        raise damaged(folder, error) from None
    for name, weight in weights.items():
        if not torch.isfinite(weight).all():
            raise RunError(
                f"{folder}: {name} is not finite, so the draft is useless: pass another --checkpoint"
            )
    return TrainedDraft(folder, page, shape, weights)


@dataclass(frozen=True)
class DraftOnCache:
    """A trained draft with its objective on a device, and held-out samples that it was not trained on."""

    folder: Path
    """Of its checkpoint."""
    step: int
    """Of its checkpoint."""
    config: RunConfig
    """Config of the draft's run."""
    reader: CacheReader
    module: TrainerModule
    held_out: np.ndarray
    """Numbers of the held-out samples."""


def open_on_cache(cache: Place, run: Path, ranks: Ranks, which: str = BEST) -> DraftOnCache:
    """Open a draft and the cache to measure it on.

    Args:
        which: as in `find_checkpoint`.

    Raises:
        DSparkError: there is no such run, checkpoint or cache, or they do not belong together.
    """
    config = load_run_config(run)
    if ranks.device.type != "cuda":  # the attention kernel used in training may need CUDA
        config = replace(config, draft=replace(config.draft, attention="auto"))
    if config.loss.kernel == "triton":  # likewise; auto selects it wherever it runs
        config = replace(config, loss=replace(config.loss, kernel="auto"))
    find_checkpoint(run, which)  # fail early: reading the cache's index takes longer
    reader = open_cache(cache, config.train)
    reader.check_shards()
    draft = open_draft(run, which)
    reader.only(draft.shape.target_layer_ids)
    draft.require_target_of(reader)
    reader.require_layers(draft.shape.target_layer_ids)
    reader.require_last_hidden("measuring the acceptance of a draft")
    _, held_out = split(reader, config.train.held_out)
    reader.alone(held_out)
    module = draft.kind.on(draft.model(reader).to(ranks.device), config, ranks.device)
    return DraftOnCache(draft.folder, draft.step, config, reader, module, held_out)
