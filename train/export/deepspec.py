"""Import a released draft in DeepSpec's layout, or in speculators', as a run: `dspark import`.

The run has one checkpoint at step 0 and is complete, so `dspark train` changes nothing in it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from pipeline import config as configuration
from pipeline.cache import CacheReader
from pipeline.errors import ConfigError, RunError, UsageError
from pipeline.files import check_new, new_folder
from pipeline.process import WorkerPlace
from pipeline.remote.address import Place
from train.config import RunConfig
from train.data.split import split
from train.draft import DRAFTS
from train.draft.kind import DraftKind
from train.draft.settings import run_config
from train.draft.shape import draft_shape, resolved
from train.draft.vocabulary import VOCABULARY, draft_vocab_size
from train.export.speculators import as_released, is_speculators, without_targets_own
from train.runs.checkpoint import FROZEN, save_checkpoint
from train.runs.directory import begin
from train.runs.names import CONFIG
from train.runs.page import Origin, TrainingPage
from train.runs.provenance import code_version
from train.runs.state import Progress
from train.runs.weights import copy_weights, find_draft, named_kind, read_config, read_released
from train.runtime.console import warn
from train.runtime.distributed import Ranks

_ASKER = "dspark import"
_ROPE = ("rope_parameters", "rope_theta", "rope_scaling")
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_TARGETS = ("vocab_size", "hidden_size", "num_target_layers")
# A run takes these from the target, so the released draft must have the same.
_AS_TARGET = ("rms_norm_eps", "hidden_act", "attention_bias", "layer_types")
# A run takes these from the target as well. Configs of other trainers may lack them.
_SCALES = ("embedding_scale", "logit_scale", "final_logit_softcapping")


def import_draft(
    folder: Path, cache: Place, run: Path, overrides: Iterable[str] = ()
) -> tuple[PretrainedConfig, int]:
    """Make a run of a released draft. The run appears complete or not at all.

    Warns on stderr if the draft comes with another embedding or head than the cache's, which the run uses,
    or if its config lacks rotary settings.

    Args:
        folder: directory with config.json and model.safetensors, or several files with an index, in fp64,
            fp32, fp16 or bf16.
        cache: cache of the draft's target, with the layers that the draft reads.
        run: directory to make; it may exist if it is empty.
        overrides: `table.key=value` settings of [loss] and [train], for measuring the draft.

    Returns:
        The draft's config, and K, the tokens that it drafts in a round.

    Raises:
        RunError: there is no such draft, it can't be read, or no run can describe it.
        CacheError: there is no such cache, or it lacks a layer.
        UsageError: `run` is not empty, or `overrides` sets [draft].
        ConfigError: a setting is wrong, or no sample of the cache is held out.
        WriteError: `run` can't be written.
    """
    check_new(run)
    source = find_draft(folder, _ASKER)
    values = _read_config(source)
    weights = without_targets_own(read_released(_kind(values), source, values, _ASKER))
    reader = CacheReader(cache)
    reader.check_shards()
    config, values = _run_config(source, values, weights, overrides)
    _check_split(reader, config)
    shape = _checked_shape(source, values, reader, config)
    config = dataclasses.replace(config, draft=resolved(config.draft, shape))
    model = DRAFTS[config.draft.kind].build(shape)
    copy_weights(model, weights, source, _ASKER)
    _check_weights(weights, source, model.frozen)
    identity, frozen = reader.manifest.identity, reader.frozen()
    model.initialize_embeddings_and_head(*(frozen[name] for name in FROZEN))
    copy_weights(model, weights, source, _ASKER)  # once more: a head may be the draft's own
    theirs = {FROZEN[0]: frozen[FROZEN[0]], FROZEN[1]: model.head_rows(frozen[FROZEN[1]])}
    for name in model.frozen:
        if name in weights and not _same(weights[name], theirs[name]):
            warn(f"{source} has another {name} than the cache {cache}: the run uses the cache's")
    if not any(name in values for name in _ROPE):
        warn(
            f"{source / 'config.json'} has no {' or '.join(_ROPE)}: the run takes the target's, "
            f"{_rope(shape)}"
        )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    page = TrainingPage(
        progress=Progress(total_steps=0, parameters=trained, complete=True),
        config=config,
        cache=identity,
        version=code_version(),
        machine={},
        imported=Origin(name=source.resolve().name),
    )
    with new_folder(run, last=CONFIG) as partial:
        begin(partial, config, identity, fresh=False, skipped=reader.manifest.skipped.sample)
        save_checkpoint(partial, model, [], page, Ranks(WorkerPlace(), torch.device("cpu")), keep=1)
    return shape, DRAFTS[config.draft.kind].slots(shape)


def _read_config(folder: Path) -> dict[str, Any]:
    """Read a released config.json, without null values, in its kind's own layout."""
    path, values = folder / "config.json", read_config(folder, _ASKER)
    if is_speculators(values):
        values = as_released(values, f"{_ASKER}: {path}")
    named, known = values.get("architectures"), [n for kind in DRAFTS.values() for n in kind.architectures]
    if named is not None and named_kind(values) is None:
        raise RunError(
            f"{_ASKER}: {path} has architectures = {named!r}, expected {' or '.join(known)}: it is another "
            "kind of draft, import another"
        )
    _kind(values).check_released(values, f"{_ASKER}: {path}")
    return values


def _kind(values: dict[str, Any]) -> DraftKind:
    """Return the kind of draft that a released config names, or the first kind if it names none."""
    return named_kind(values) or next(iter(DRAFTS.values()))


def _check_split(reader: CacheReader, config: RunConfig) -> None:
    """Check that the cache has samples for both sides of the split. Raise ConfigError if not."""
    try:
        split(reader, config.train.held_out)
    except ConfigError as error:
        raise ConfigError(f"{_ASKER}: {error}; set the share with --set train.held_out=") from None


def _check_weights(weights: dict[str, Tensor], folder: Path, frozen: tuple[str, ...]) -> None:
    """Check that weights are finite and of a known dtype. Raise RunError naming the tensor."""
    for name in sorted(weights.keys() - {*frozen, *VOCABULARY}):
        if weights[name].dtype not in _DTYPES:
            kind = str(weights[name].dtype).removeprefix("torch.")
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
            raise RunError(
                f"{_ASKER}: {name} of {folder} is {kind}, expected one of {known}: import the draft from "
                "before it was quantized"
            )
        if not torch.isfinite(weights[name].float()).all():
            raise RunError(
                f"{_ASKER}: {name} of {folder} is not finite in float32: the file is damaged, or its "
                "training diverged; import another draft"
            )


def _run_config(
    folder: Path, values: dict[str, Any], weights: dict[str, Tensor], overrides: Iterable[str]
) -> tuple[RunConfig, dict[str, Any]]:
    """Return the run's settings, and the released config with all fields on top.

    [draft] is from the files, the other tables are from the overrides.
    """
    where = str(folder / "config.json")
    tables = configuration.apply_overrides({}, overrides)
    if "draft" in tables:
        raise UsageError(f"--set draft.* is not allowed, {where} decides it: set only [loss] and [train]")
    kind = _kind(values)
    draft, values = kind.released_settings(values, weights, f"{_ASKER}: {where}")
    config = run_config({**tables, "draft": {"kind": kind.name, **draft}}, where)
    anchors, asked = values.get("num_anchors"), tables.get("train", {})
    # Other trainers count anchors per sample, so a number that no batch here has room for is ignored.
    if type(anchors) is int and 1 <= anchors < config.train.batch_tokens and "anchors_per_batch" not in asked:
        train = dataclasses.replace(config.train, anchors_per_batch=anchors)
        config = dataclasses.replace(config, train=train)
    return config, values


def _checked_shape(
    folder: Path, values: dict[str, Any], reader: CacheReader, config: RunConfig
) -> PretrainedConfig:
    """Return the draft's config as a run has it.

    Raises:
        RunError: the released config differs: it is for another target, or no run can describe it.
    """
    target = reader.manifest.identity.target
    theirs = DRAFTS[config.draft.kind].config_class.from_dict(dict(values))
    ours = {"vocab_size": target.vocab_size, "hidden_size": target.hidden_size}
    ours["num_target_layers"] = target.num_layers
    found = {name: getattr(theirs, name, ours[name]) for name in _TARGETS}
    differing = [f"{n}: {found[n]} there, {ours[n]} in the cache" for n in _TARGETS if found[n] != ours[n]]
    if differing:
        raise RunError(
            f"{_ASKER}: {folder} is a draft for another target than {target.name} ({'; '.join(differing)}): "
            "pass a --cache of the draft's target"
        )
    shape = draft_shape(reader, config)
    names = (*_AS_TARGET, *(name for name in _SCALES if name in values))
    both = {n: (getattr(theirs, n), getattr(shape, n)) for n in names if hasattr(shape, n)}
    if any(name in values for name in _ROPE):
        both["rope_parameters"] = (_rope(theirs), _rope(shape))
    size = draft_vocab_size(shape)
    both["draft_vocab_size"] = (values.get("draft_vocab_size", size), size)
    differing = [f"{name}: {a} there, {b} here" for name, (a, b) in both.items() if a != b]
    if differing:
        raise RunError(
            f"{_ASKER}: {folder} has other values than this target ({'; '.join(differing)}), but runs take "
            "these from the target: import another draft"
        )
    return shape


def _rope(config: PretrainedConfig) -> dict[str, Any]:
    """Return the rotary settings without defaults, for comparison."""
    rope = {"rope_type": "default", **config.rope_parameters}
    return {name: v for name, v in rope.items() if not (name == "partial_rotary_factor" and v == 1)}


def _same(found: Tensor, ours: Tensor) -> bool:
    """Return whether two tensors hold the same weights, one of them possibly rounded."""
    if found.shape != ours.shape or not found.is_floating_point():
        return False
    return torch.equal(found.to(ours.dtype), ours) or torch.equal(ours.to(found.dtype), found)
