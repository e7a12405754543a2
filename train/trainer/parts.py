"""Parts of a running training, built from its `Setup` and the checkpoint to continue from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from train.config import RunConfig
from train.draft.kind import TrainerModule
from train.losses.slots import Objective
from train.runs.checkpoint import load_states
from train.runs.directory import MetricsFile
from train.runs.page import TrainingPage, damaged
from train.runs.provenance import code_version, machine_facts
from train.runs.state import Progress
from train.runtime.distributed import Ranks, SpreadModule
from train.runtime.precision import resolve_precision
from train.trainer.metrics import Window, peak_flops
from train.trainer.optimizer import build_optimizers
from train.trainer.setup import Setup, build_draft, count_run_steps


@dataclass(frozen=True)
class Checkpoint:
    """Checkpoint that a run continues from."""

    folder: Path
    page: TrainingPage


@dataclass(frozen=True, kw_only=True)
class Parts:
    """Parts of a running training on this rank."""

    module: TrainerModule
    """Draft with its objective."""
    spread: SpreadModule
    """Module on all ranks."""
    optimizers: list[Optimizer]
    progress: Progress
    """Progress of the run, updated in place."""
    window: Window
    """Sums since the last log line."""
    metrics: MetricsFile | None
    """File metrics.jsonl; None except on the first rank."""
    machine: dict[str, Any]
    """Device, ranks, precision and attention kernel."""
    version: dict[str, str]
    """Versions of the code and its libraries."""

    def page(self, config: RunConfig, identity: Any) -> TrainingPage:
        """Return the page of a checkpoint saved now.

        Args:
            config: the run's config.
            identity: the cache's identity.
        """
        return TrainingPage(
            progress=self.progress, config=config, cache=identity, version=self.version, machine=self.machine
        )


def build_parts(ranks: Ranks, setup: Setup, run: Path, checkpoint: Checkpoint | None) -> Parts:
    """Build a run's parts. All ranks must call this together.

    Args:
        run: the run's directory.
        checkpoint: checkpoint to continue from; None begins the run.

    Raises:
        RunError: the checkpoint is damaged.
    """
    config, device = setup.config, ranks.device
    train = config.train
    precision = resolve_precision(device, train.precision)
    with ranks.together():
        model = build_draft(setup, checkpoint and checkpoint.folder)
        model.to(device)
        if checkpoint is None and ranks.leads:
            setup.kind.initialise(model, config.draft, setup.reader, setup.samples)
    if checkpoint is not None:
        progress = checkpoint.page.progress
    else:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        progress = Progress(total_steps=count_run_steps(setup), parameters=trained)
    sharded = ranks.world > 1 and train.parallelism == "fsdp"
    module = setup.kind.on(model, config, device, by_layer=sharded)
    spread = SpreadModule(module, ranks, list(model.layers), train.parallelism, precision)
    optimizers = build_optimizers(model, train, setup.kind.lr_scales(train), setup.kind.matrices)
    peak = peak_flops(device, precision, train.tf32)
    peak = None if peak is None else peak * ranks.world
    window = Window(Objective.of(config.loss), device, peak, teacher=setup.reader.has_last_hidden)
    if checkpoint is not None:
        with ranks.together():
            load_states(checkpoint.folder, model, optimizers, progress, ranks)
            _load_window(window, checkpoint)
    with ranks.together():
        metrics = MetricsFile(run, progress.metrics_bytes) if ranks.leads else None
    return Parts(
        module=module,
        spread=spread,
        optimizers=optimizers,
        progress=progress,
        window=window,
        metrics=metrics,
        machine=machine_facts(ranks, precision, model.attention),
        version=code_version(),
    )


def _load_window(window: Window, checkpoint: Checkpoint) -> None:
    state = checkpoint.page.progress.window
    if state is None:
        return
    try:
        window.load(state)
    except (ValueError, TypeError, KeyError) as error:
        raise damaged(checkpoint.folder, error) from None
