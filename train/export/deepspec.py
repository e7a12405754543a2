"""A released draft in DeepSpec's layout as a run of its own: `dspark import`.

The run has one checkpoint at step 0 and is complete, so that training it again changes nothing.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from transformers import Qwen3Config

from pipeline import config as configuration
from pipeline.cache import CacheReader
from pipeline.errors import ConfigError, RunError, UsageError
from pipeline.files import check_new, new_folder
from pipeline.process import WorkerPlace
from train.config import RunConfig
from train.draft.dspark.model import Qwen3DSparkModel
from train.eval.validate import split
from train.runs.checkpoint import FROZEN, save_checkpoint
from train.runs.directory import CONFIG, begin
from train.runs.provenance import code_version
from train.runs.state import Progress
from train.runs.weights import copy_weights, find_draft, read_weights
from train.runtime.distributed import Ranks
from train.trainer.setup import draft_shape, resolved

_ASKER = "dspark import"
_REQUIRED = ("target_layer_ids", "mask_token_id")
# A run describes its draft by these, under the names of its [draft] table.
_SETTINGS = {
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "block_size": "block_size",
    "target_layer_ids": "target_layer_ids",
    "mask_token_id": "mask_token_id",
    "enable_confidence_head": "confidence_head",
    "confidence_head_with_markov": "confidence_with_markov",
}
# What engines take where a config does not say (SGLang 0.5.23: dspark_config.py; vLLM 0.33.0 has them alike).
_DEFAULTS = {"block_size": 7, "markov_rank": 0, "markov_head_type": "vanilla"}
# What every draft of this project is; elsewhere there are others.
_FIXED = {
    "model_type": "qwen3",
    "sample_from_anchor": True,
    "dspark_bonus_anchor": False,
    "is_causal": False,
    "dflash_config": None,
}
# The draft's classes in vLLM and SGLang; another class has weights of another meaning.
_ARCHITECTURES = (["Qwen3DSparkModel"], ["DSparkDraftModel"])
# Where one of these is, an engine reads it instead of the field that is read here.
_READ_FIRST = (
    *("dspark_config", "dspark_block_size", "dspark_markov_rank", "dspark_noise_token_id"),
    *("dspark_target_layer_ids", "eagle_aux_hidden_state_layer_ids"),
)
_ROPE = ("rope_parameters", "rope_theta", "rope_scaling")
_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_TARGETS = ("vocab_size", "hidden_size", "num_target_layers")
# A run takes these from the target, as drafts for it do.
_AS_TARGET = ("rms_norm_eps", "hidden_act", "attention_bias", "layer_types")
# And these too, of which other trainers' configs say nothing.
_SCALES = ("embedding_scale", "logit_scale", "final_logit_softcapping")


def import_draft(folder: Path, cache: Path, run: Path, overrides: Iterable[str] = ()) -> Qwen3Config:
    """Make a run of a draft in DeepSpec's layout. It appears whole or not at all.

    Says so on stderr if the draft brings another embedding or head than the cache's, which the run uses, or
    says nothing of rotary positions.

    Args:
        folder: has config.json and model.safetensors, or several files with an index; fp64, fp32, fp16 or
            bf16.
        cache: of the draft's target, with the layers that it reads.
        run: to be made; an empty directory may be there.
        overrides: `table.key=value` of [loss] and [train], which say how the draft is measured.

    Returns:
        The draft's config.

    Raises:
        RunError: there is no such draft, it can't be read, or no run can describe it.
        CacheError: there is no such cache, or it lacks a layer.
        UsageError: `run` is not empty.
        ConfigError: a setting is wrong, or nothing of the cache is held out to measure by.
        WriteError: `run` can't be written.
    """
    check_new(run)
    source = find_draft(folder, _ASKER)
    values = _read_config(source)
    weights = read_weights(source, _ASKER)
    reader = CacheReader(cache)
    reader.check_shards()
    config = _run_config(source, values, weights, overrides)
    _check_split(reader, config)
    shape = _checked_shape(source, values, reader, config)
    config = dataclasses.replace(config, draft=resolved(config.draft, shape))
    model = Qwen3DSparkModel(shape).float()
    frozen = reader.frozen()
    model.initialize_embeddings_and_head(frozen[FROZEN[0]], frozen[FROZEN[1]])
    copy_weights(model, weights, source, _ASKER)
    _check_weights(weights, source)
    identity = reader.manifest.identity
    for name in FROZEN:
        if name in weights and not _same(weights[name], frozen[name]):
            click.echo(
                f"warning: {source} has another {name} than the cache {cache}: the run uses the cache's",
                err=True,
            )
    if not any(name in values for name in _ROPE):
        click.echo(
            f"warning: {source / 'config.json'} has no {' or '.join(_ROPE)}: the run takes the target's, "
            f"{_rope(shape)}",
            err=True,
        )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    about = {
        "config": dataclasses.asdict(config),
        "cache": dataclasses.asdict(identity),
        "version": code_version(),
        "machine": {},
        "imported": {"name": source.resolve().name},
    }
    with new_folder(run, last=CONFIG) as partial:
        begin(partial, config, identity, fresh=False)
        save_checkpoint(
            partial,
            model,
            [],
            Progress(total_steps=0, parameters=trained, complete=True),
            Ranks(WorkerPlace(), torch.device("cpu")),
            about,
            keep=1,
        )
    return shape


def _read_config(folder: Path) -> dict[str, Any]:
    """A released config.json, as far as it has to say something."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("no object")
    except (OSError, ValueError) as error:
        raise RunError(f"{_ASKER}: {path} can't be read ({error})") from None
    values = {name: value for name, value in values.items() if value is not None}
    for name in _REQUIRED:
        if name not in values:
            raise RunError(f"{_ASKER}: {folder} is no DSpark draft: its config.json has no {name}")
    for name, value in _FIXED.items():
        if name in values and values[name] != value:
            raise RunError(
                f"{_ASKER}: {path} has {name} = {values[name]!r}, and a draft here has {value!r}: it is "
                "another kind of draft"
            )
    for name in _READ_FIRST:
        if name in values:
            raise RunError(
                f"{_ASKER}: {path} has {name}, which engines read before what is read here: write it as "
                "block_size, markov_rank, mask_token_id or target_layer_ids, and take it away"
            )
    if "quantization_config" in values:
        raise RunError(
            f"{_ASKER}: {path} has a quantization_config, and a draft here has plain weights: import it from "
            "before it was quantized"
        )
    if "architectures" in values and values["architectures"] not in _ARCHITECTURES:
        known = " or ".join(name for (name,) in _ARCHITECTURES)
        raise RunError(
            f"{_ASKER}: {path} has architectures = {values['architectures']!r}, and {known} is expected: it "
            "is another kind of draft"
        )
    return values


def _check_split(reader: CacheReader, config: RunConfig) -> None:
    """Whether the run can be measured. Raises ConfigError where it can't."""
    try:
        split(reader, config.train.held_out)
    except ConfigError as error:
        raise ConfigError(f"{_ASKER}: {error}; --set train.held_out= sets the share") from None


def _check_weights(weights: dict[str, Tensor], folder: Path) -> None:
    """Whether a run can go on with the weights that it takes. Raises RunError with the tensor's name."""
    for name in sorted(weights.keys() - {*FROZEN}):
        if weights[name].dtype not in _DTYPES:
            kind = str(weights[name].dtype).removeprefix("torch.")
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
            raise RunError(
                f"{_ASKER}: {name} of {folder} is {kind}, expected one of {known}: import the draft from "
                "before it was quantized"
            )
        if not torch.isfinite(weights[name].float()).all():
            raise RunError(
                f"{_ASKER}: {name} of {folder} is not finite in float32: the file is damaged, or of a "
                "training that went astray; import another"
            )


def _run_config(
    folder: Path, values: dict[str, Any], weights: dict[str, Tensor], overrides: Iterable[str]
) -> RunConfig:
    """The run's settings: [draft] is what the files say, the rest is free."""
    where = str(folder / "config.json")
    tables = configuration.apply_overrides({}, overrides)
    if "draft" in tables:
        raise UsageError(f"--set draft.* says what {where} says already: set only [loss] and [train]")
    values = _DEFAULTS | values
    try:
        body = Qwen3Config.from_dict(dict(values))
        values |= {name: getattr(body, name) for name in _SETTINGS if hasattr(body, name)}
        rank = int(values["markov_rank"])
    except Exception as error:  # what transformers raises for a config is not of one kind
        reason = " ".join(str(error).split())[:200]
        raise RunError(f"{_ASKER}: {where} can't be read ({reason})") from None
    draft = {ours: values[theirs] for theirs, ours in _SETTINGS.items() if theirs in values}
    draft["markov_head"] = values["markov_head_type"] if rank else "none"
    if rank:
        draft["markov_rank"] = values["markov_rank"]
    # Where a config does not say, vLLM and SGLang do not agree, but the weights tell.
    confidence = weights.get("confidence_head.proj.weight")
    wider = confidence is not None and confidence.shape[-1] > body.hidden_size
    draft = {"confidence_head": confidence is not None, "confidence_with_markov": wider} | draft
    if not rank:
        draft["confidence_with_markov"] = False
    config = configuration.build(RunConfig, {**tables, "draft": draft}, where)
    anchors, asked = values.get("num_anchors"), tables.get("train", {})
    # Others draw theirs of every sample: what no batch here has room for says nothing, and takes memory.
    if type(anchors) is int and 1 <= anchors < config.train.batch_tokens and "anchors_per_batch" not in asked:
        train = dataclasses.replace(config.train, anchors_per_batch=anchors)
        config = dataclasses.replace(config, train=train)
    return config


def _checked_shape(
    folder: Path, values: dict[str, Any], reader: CacheReader, config: RunConfig
) -> Qwen3Config:
    """The draft's config as a run has it.

    Raises:
        RunError: it is not the released one: that is for another target, or no run can describe it.
    """
    target = reader.manifest.identity.target
    theirs = Qwen3Config.from_dict(dict(values))
    ours = {"vocab_size": target.vocab_size, "hidden_size": target.hidden_size}
    ours["num_target_layers"] = target.num_layers
    found = {name: getattr(theirs, name, ours[name]) for name in _TARGETS}
    differing = [f"{n}: {found[n]} there, {ours[n]} in the cache" for n in _TARGETS if found[n] != ours[n]]
    if differing:
        raise RunError(
            f"{_ASKER}: {folder} is a draft for another target than {target.name} ({'; '.join(differing)}): "
            "pass --cache of its own target"
        )
    shape = draft_shape(reader, config)
    names = (*_AS_TARGET, *(name for name in _SCALES if name in values))
    both = {name: (getattr(theirs, name), getattr(shape, name)) for name in names}
    if any(name in values for name in _ROPE):
        both["rope_parameters"] = (_rope(theirs), _rope(shape))
    both["draft_vocab_size"] = (values.get("draft_vocab_size", shape.vocab_size), shape.vocab_size)
    differing = [f"{name}: {a} there, {b} here" for name, (a, b) in both.items() if a != b]
    if differing:
        raise RunError(
            f"{_ASKER}: {folder} has what no run can have with this target ({'; '.join(differing)}): runs "
            "take these from the target"
        )
    return shape


def _rope(config: Qwen3Config) -> dict[str, Any]:
    """Rotary settings without what says nothing."""
    rope = {"rope_type": "default", **config.rope_parameters}
    return {name: v for name, v in rope.items() if not (name == "partial_rotary_factor" and v == 1)}


def _same(found: Tensor, ours: Tensor) -> bool:
    """Whether two are the same weights, of which one may have been rounded."""
    if found.shape != ours.shape or not found.is_floating_point():
        return False
    return torch.equal(found.to(ours.dtype), ours) or torch.equal(ours.to(found.dtype), found)
