"""Initial weights from an existing draft: a run's, or a released one in DeepSpec's layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from pipeline.errors import RunError
from train.draft import DRAFTS
from train.draft.kind import DraftKind
from train.draft.vocabulary import check_d2t, with_t2d
from train.runs.names import BEST, LATEST, TRAINING, WEIGHTS

# Prefix of error messages: the setting or command that names the draft.
_SETTING = "draft.init_from"


def find_draft(source: Path, asker: str = _SETTING) -> Path:
    """Return the folder with config.json: a run's best or else latest checkpoint, or the source itself.

    Args:
        asker: prefix of error messages.

    Raises:
        RunError: there is no draft.
    """
    for folder in (source / BEST, source / LATEST, source):
        if (folder / "config.json").is_file():
            return folder
    raise RunError(
        f"{asker}: no draft at {source}: expected a run, or a directory with config.json and safetensors "
        "weights"
    )


def check_warm_start(kind: DraftKind, shape: PretrainedConfig, source: Path) -> None:
    """Check that a draft's weights mean the same in a run as in their source.

    A released config may lack any field but the layers and the mask token. It must describe a draft of the
    kind, as `dspark import` asks for it.

    Args:
        kind: kind of the run's draft.
        shape: Hugging Face config of the run's draft.
        source: run or directory that the weights come from.

    Raises:
        RunError: there is no draft, it is of another kind, or its config differs: the message names the
            fields.
    """
    folder = find_draft(source)
    found = read_config(folder)
    _check_kind(kind, found, folder)
    if not (folder / TRAINING).is_file():
        kind.check_released(found, f"{_SETTING}: {folder / 'config.json'}")
    try:
        theirs = kind.weight_fields(found)
        rope = found.get("rope_parameters") or {"rope_theta": found.get("rope_theta")}
        if rope.get("rope_theta") is not None:
            theirs["rope_theta"] = float(rope["rope_theta"])
    except (ValueError, TypeError, AttributeError) as error:
        raise RunError(f"{_SETTING}: {folder / 'config.json'} can't be read ({error})") from None
    ours = kind.weight_fields(shape.to_dict())
    ours["rope_theta"] = float(shape.rope_parameters["rope_theta"])
    names = [name for name in theirs if name in ours]
    differing = [f"{n}: {ours[n]} here, {theirs[n]} there" for n in names if theirs[n] != ours[n]]
    missing = [name for name in kind.resolved if name in kind.config_fields and name not in theirs]
    if missing:
        raise RunError(
            f"{_SETTING}: {folder} holds no {kind.title} draft (its config.json has no {missing[0]}): pass "
            "another"
        )
    if differing:
        raise RunError(
            f"{_SETTING}: {folder} differs from this run's draft ({'; '.join(differing)}): set [draft] "
            "as there, or start from another draft"
        )


def read_config(folder: Path, asker: str = _SETTING) -> dict[str, Any]:
    """Read a draft's config.json, without null values. Raise RunError if it can't be read."""
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("expected a JSON object")
    except (OSError, ValueError) as error:
        raise RunError(f"{asker}: {folder / 'config.json'} can't be read ({error})") from None
    return {name: value for name, value in values.items() if value is not None}


def named_kind(values: Mapping[str, Any]) -> DraftKind | None:
    """Return the kind of draft whose class a config.json names; None if it names none of ours."""
    named = values.get("architectures")
    return next((k for k in DRAFTS.values() if named in [[name] for name in k.architectures]), None)


def _check_kind(kind: DraftKind, values: Mapping[str, Any], folder: Path) -> None:
    """Check that a config names no other kind of draft: weights of two kinds may have the same names."""
    named = named_kind(values)
    if named is not None and named.name != kind.name:
        raise RunError(
            f"{_SETTING}: {folder} holds a draft of kind {named.title}, not {kind.title}: set draft.kind = "
            f'"{named.name}", or start from another draft'
        )


def warm_start(model: PreTrainedModel, kind: DraftKind, source: Path) -> None:
    """Copy a draft's weights into a model. Its embedding and head stay the cache's.

    Raises:
        RunError: weights are missing, unknown, of another shape or unreadable.
    """
    folder = find_draft(source)
    copy_weights(model, read_released(kind, folder, read_config(folder)), folder)


def read_released(
    kind: DraftKind, folder: Path, values: Mapping[str, Any], asker: str = _SETTING
) -> dict[str, Tensor]:
    """Read a draft's weights by the names that a run's have, whoever wrote them.

    Args:
        values: of config.json.
        asker: prefix of error messages.

    Raises:
        RunError: the weights can't be read.
    """
    return kind.released_weights(read_weights(folder, asker), values)


def copy_weights(
    model: PreTrainedModel, found: dict[str, Tensor], folder: Path, asker: str = _SETTING
) -> None:
    """Copy weights into a draft, except embedding and head.

    Args:
        found: tensors by name.
        folder: source of the tensors, for messages.
        asker: prefix of error messages.

    Raises:
        RunError: weights are missing, unknown or of another shape, or `d2t` names no vocabulary.
    """
    try:
        check_d2t(found, model.config.vocab_size)
    except ValueError as error:
        raise RunError(f"{asker}: {folder}: {error}: pass another draft") from None
    found = with_t2d(found, model.config.vocab_size)
    wanted = {n: p for n, p in model.state_dict(keep_vars=True).items() if n not in model.frozen}
    names = {*wanted} ^ {n for n in found if n not in model.frozen}
    if names:
        lacks = sorted(names & {*wanted})
        what = f"lacks {lacks[0]}" if lacks else f"has {min(names)}, which this run's draft lacks"
        raise RunError(f"{asker}: {folder} {what}: it is another kind of draft")
    for name, parameter in wanted.items():
        if found[name].shape != parameter.shape:
            raise RunError(
                f"{asker}: {name} of {folder} is of shape {list(found[name].shape)}, expected "
                f"{list(parameter.shape)}: it is another kind of draft"
            )
    for name, parameter in wanted.items():
        with torch.no_grad():
            parameter.copy_(found[name])


def read_weights(folder: Path, asker: str = _SETTING) -> dict[str, Tensor]:
    """Read all tensors of a folder's safetensors files: one file, or several with an index.

    Args:
        asker: prefix of error messages.

    Raises:
        RunError: the weights can't be read.
    """
    weights: dict[str, Tensor] = {}
    try:
        index = folder / "model.safetensors.index.json"
        names = {WEIGHTS}
        if index.is_file():
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        for name in sorted(names):
            if Path(name).name != name:
                raise ValueError(f"{index.name} names {name!r}")
            with safe_open(folder / name, "pt") as file:
                weights |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, KeyError, AttributeError, TypeError, SafetensorError) as error:
        raise RunError(f"{asker}: the weights in {folder} can't be read ({error})") from None
    return weights
