"""Checkpoints of a run: the draft in Hugging Face layout, and the state to continue training exactly.

    RUN/checkpoints/step-000400/config.json           the draft's config
                                model.safetensors     its weights, without the target's embedding and head
                                training.safetensors  optimiser states and random generators
                                training.json         progress, settings, cache identity, code version
    RUN/latest -> checkpoints/step-000400             RUN/best: the one with the best held-out tau

Tensors are saved unsharded, so a run can continue with another world size. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from pipeline import files
from pipeline.errors import RunError, WriteError
from train.runs.names import BEST, CHECKPOINTS, LATEST, STATES, TRAINING, WEIGHTS
from train.runs.page import TrainingPage, damaged, read_training
from train.runs.state import Progress
from train.runtime.distributed import Ranks, whole

FROZEN = ("embed_tokens.weight", "lm_head.weight")
# State that an optimiser keeps for each parameter after its first step.
STATE_NAMES = {"AdamW": ("step", "exp_avg", "exp_avg_sq"), "Muon": ("momentum_buffer",)}


def checkpoints(run: Path) -> list[Path]:
    """Return a run's finished checkpoints, the oldest first."""
    found = (path for path in (run / CHECKPOINTS).glob("step-*") if path.name[5:].isdecimal())
    return sorted(
        (path for path in found if (path / TRAINING).is_file()), key=lambda path: int(path.name[5:])
    )


def newest(run: Path) -> Path | None:
    """Return the checkpoint that a run continues from; None if it has none."""
    return next(reversed(checkpoints(run)), None)


def _name(step: int) -> str:
    return f"step-{step:06d}"


def save_checkpoint(
    run: Path,
    model: PreTrainedModel,
    optimizers: Sequence[Optimizer],
    page: TrainingPage,
    ranks: Ranks,
    *,
    keep: int,
) -> None:
    """Write `RUN/checkpoints/step-N`, update the links `latest` and `best`, remove old checkpoints.

    All ranks must call this; the first one writes. A checkpoint appears complete or not at all.

    Args:
        page: content of the checkpoint's `training.json`.
        keep: newest checkpoints to keep, in addition to the best.

    Raises:
        RunError: a weight is not finite. The last checkpoint is unchanged.
        WriteError: the disk is full, or another error of writing. The last checkpoint is unchanged.
    """
    weights = {n: _gathered(p, ranks) for n, p in model.state_dict().items() if _trained(model, n)}
    states = _optimizer_tensors(model, optimizers, ranks)
    for rank, generators in enumerate(ranks.gather(_random_states(ranks))):
        states |= {f"random.{rank}.{name}": state for name, state in generators.items()}
    with ranks.together():
        if ranks.leads:
            check_finite(run, page.progress.step, weights)
            try:
                _write(run, model, weights, states, page)
                _point(run, page.progress)
                _prune(run, page.progress, keep)
            except OSError as error:
                raise WriteError(
                    f"{run}: the checkpoint can't be written ({error.strerror or error}): fix that, then run "
                    "the same command again; it continues from the last checkpoint"
                ) from None


def check_finite(run: Path, step: int, values: dict[str, Tensor]) -> None:
    """Check weights, or figures of a draft, on the CPU. Raise RunError naming one that is not finite."""
    for name, value in values.items():
        if not torch.isfinite(value).all():
            kept = newest(run)
            rest = f"{run} keeps {kept.name}" if kept else f"{run} has no checkpoint"
            raise RunError(
                f"step {step}: {name} is not finite, so the draft is useless and not saved; {rest}: train "
                "again with a lower train.lr, in another --run or with --fresh"
            )


def _trained(model: PreTrainedModel, name: str) -> bool:
    """Return whether a checkpoint holds a weight: all but the target's embedding and head while frozen."""
    return name not in model.frozen or model.get_parameter(name).requires_grad


def _gathered(tensor: Tensor, ranks: Ranks) -> Tensor:
    """Return a tensor unsharded on the first rank's CPU; an empty one on the other ranks."""
    tensor = whole(tensor.detach())
    return tensor.cpu().contiguous() if ranks.leads else tensor.new_empty(0)


def _optimizer_tensors(
    model: PreTrainedModel, optimizers: Sequence[Optimizer], ranks: Ranks
) -> dict[str, Tensor]:
    """Return the optimiser states, named `optimizer.<parameter>.<state>`."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"optimizer.{names[parameter]}.{key}": _gathered(value, ranks)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
        for key, value in optimizer.state[parameter].items()
    }


def _random_states(ranks: Ranks) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(ranks.device)
    return states


def _write(
    run: Path,
    model: PreTrainedModel,
    weights: dict[str, Tensor],
    states: dict[str, Tensor],
    page: TrainingPage,
) -> None:
    folder = run / CHECKPOINTS / _name(page.progress.step)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        model.config.dtype = next(iter(weights.values())).dtype
        model.config.save_pretrained(partial)
        save_file(weights, partial / WEIGHTS, metadata={"format": "pt"})
        save_file(states, partial / STATES, metadata={"format": "pt"})
        (partial / TRAINING).write_text(json.dumps(page.values(), indent=1) + "\n", encoding="utf-8")
        mode = (partial / TRAINING).stat().st_mode
        for path in partial.iterdir():
            path.chmod(mode)  # follows the user's umask; safetensors makes files that only the user can read
            with path.open("rb") as file:
                os.fsync(file.fileno())
        files.sync(partial)
        if folder.exists():  # a run that was stopped during an evaluation saves this step again
            folder.rename(_aside(folder))
        partial.rename(folder)
        shutil.rmtree(_aside(folder), ignore_errors=True)
    except SafetensorError as error:
        raise OSError(str(error)) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    files.sync(folder.parent)


def _aside(folder: Path) -> Path:
    """Return the temporary name of a checkpoint that another of the same step replaces."""
    return folder.with_name(f".{folder.name}.old")


def _remove(folder: Path) -> None:
    """Remove a checkpoint. Rename it first, so that a half-removed one does not look like a checkpoint."""
    partial = folder.with_name(f".{folder.name}.removed.partial")
    shutil.rmtree(partial, ignore_errors=True)
    folder.rename(partial)
    shutil.rmtree(partial)


def _point(run: Path, progress: Progress) -> None:
    """Point `latest` to the checkpoint of this progress, and `best` to that of the best evaluation."""
    steps = {LATEST: progress.step, BEST: progress.best.step if progress.best else None}
    for name, step in steps.items():
        link = run / name
        if step is None or not (run / CHECKPOINTS / _name(step)).is_dir():
            continue
        if link.is_dir() and not link.is_symlink():  # the run was copied without symlinks
            shutil.rmtree(link)
        partial = run / f".{name}.partial"
        partial.unlink(missing_ok=True)
        partial.symlink_to(Path(CHECKPOINTS) / _name(step))
        partial.replace(link)
    files.sync(run)


def _prune(run: Path, progress: Progress, keep: int) -> None:
    """Remove all checkpoints but the newest and the best."""
    best = _name(progress.best.step) if progress.best else None
    for folder in checkpoints(run)[:-keep]:
        if folder.name != best:
            _remove(folder)


def repair(run: Path, keep: int) -> None:
    """Finish or undo a save that was killed. Lose no checkpoint, and update the links.

    Args:
        keep: newest checkpoints to keep, in addition to the best.

    Raises:
        RunError: the newest checkpoint is damaged.
    """
    for old in (run / CHECKPOINTS).glob(".step-*.old"):
        folder = old.with_name(old.name.removeprefix(".").removesuffix(".old"))
        if folder.exists():
            shutil.rmtree(old)
        else:
            old.rename(folder)
    for left in (run / CHECKPOINTS).glob(".step-*.partial"):
        shutil.rmtree(left)
    folder = newest(run)
    if folder is not None:
        progress = read_training(folder).progress
        _point(run, progress)
        _prune(run, progress, keep)


def load_weights(model: PreTrainedModel, folder: Path) -> None:
    """Load a checkpoint's weights into a draft that has the target's embedding and head.

    Raises:
        RunError: the weights can't be read, or belong to another draft.
    """
    try:
        weights = load_file(folder / WEIGHTS)
        check_shapes(weights, {n: p.shape for n, p in model.state_dict().items() if _trained(model, n)})
    except (OSError, ValueError, SafetensorError) as error:
        raise damaged(folder, error) from None
    copy_tensors(model, weights)


def check_shapes(weights: dict[str, Tensor], wanted: dict[str, torch.Size]) -> None:
    """Raise ValueError if a checkpoint's tensors are not those that its config describes."""
    if {name: weight.shape for name, weight in weights.items()} != wanted:
        raise ValueError(f"{WEIGHTS} has other tensors than config.json describes")


def copy_tensors(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy weights into a draft's parameters and buffers, by name."""
    own = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, weight in weights.items():
            own[name].copy_(weight)


def load_states(
    folder: Path,
    model: PreTrainedModel,
    optimizers: Sequence[Optimizer],
    progress: Progress,
    ranks: Ranks,
) -> None:
    """Load a checkpoint's states into optimisers and random generators.

    Args:
        progress: the checkpoint's progress.

    Raises:
        RunError: the states can't be read, or do not fit.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    stepped = progress.step > progress.skipped_steps
    try:
        with safe_open(folder / STATES, "pt") as file:
            keys = set(file.keys())
            for optimizer in optimizers:
                _load_optimizer(optimizer, names, file, stepped=stepped)
            own = {name: f"random.{ranks.rank}.{name}" for name in ("cpu", ranks.device.type)}
            if own["cpu"] in keys:
                torch.set_rng_state(file.get_tensor(own["cpu"]))
            if "cuda" in own and own["cuda"] in keys:
                torch.cuda.set_rng_state(file.get_tensor(own["cuda"]), ranks.device)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, TypeError, SafetensorError, RuntimeError) as error:
        raise damaged(folder, error) from None


def _load_optimizer(optimizer: Optimizer, names: dict[Tensor, str], file: Any, *, stepped: bool) -> None:
    saved = optimizer.state_dict()  # parameters by their number in the groups
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    saved["state"] = {}
    for number, parameter in enumerate(parameters) if stepped else ():
        saved["state"][number] = state = {}
        for key in STATE_NAMES[type(optimizer).__name__]:
            value = file.get_tensor(f"optimizer.{names[parameter]}.{key}")
            if value.shape != (() if key == "step" else parameter.shape) or not value.is_floating_point():
                raise ValueError(f"{key} of {names[parameter]} is {value.dtype} {list(value.shape)}")
            if isinstance(parameter, DTensor) and value.ndim:
                value = value.to(parameter.device)
                where = (parameter.device_mesh, parameter.placements)
                value = distribute_tensor(value, *where, src_data_rank=None)  # every rank has read it whole
            state[key] = value
    optimizer.load_state_dict(saved)


def drop_weights(run: Path) -> None:
    """Remove the weights and optimiser states of a run, which keeps its figures and can't be opened again."""
    for folder in checkpoints(run):
        for name in (WEIGHTS, STATES):
            (folder / name).unlink(missing_ok=True)
