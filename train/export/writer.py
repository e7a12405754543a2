"""A trained draft as inference engines load it: `dspark export`.

    DIR/config.json         a Qwen3 config with DSpark's fields at its top level
        model.safetensors   the draft's weights, without a prefix; the target's embedding and head on request
        README.md           the model card
        calibration.json    temperatures of the confidence head, where `dspark calibrate` found some

What an engine can't serve is refused before anything is written: engines load much of it without a word and
then accept hardly any token.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click
import torch
from jinja2 import TemplateError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3Config

from pipeline import config as configuration
from pipeline.cache import CacheReader
from pipeline.cache.manifest import Identity
from pipeline.errors import RunError, UsageError
from pipeline.files import check_new, new_folder
from train.draft.dspark.model import Qwen3DSparkModel
from train.export.engines import TARGETS, check_engine, obstacle, scale_of, unknown_target
from train.export.model_card import model_card
from train.runs.checkpoint import BEST, FROZEN, WEIGHTS, find_checkpoint
from train.runs.results import (
    CALIBRATION,
    EVALUATION,
    SPECULATION,
    all_numbers,
    read_figures,
    read_temperatures,
)
from train.runs.state import Progress, damaged, read_training

CARD = "README.md"
CONFIG = "config.json"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
To = Literal["hf", "vllm", "sglang"]


@dataclass(frozen=True)
class Draft:
    """A checkpoint, read without a cache."""

    folder: Path
    config: Qwen3Config
    weights: dict[str, Tensor]
    """All but the target's embedding and head, fp32."""
    progress: Progress
    page: dict[str, Any]
    """Its training.json."""
    trained_on: Identity
    """The cache's."""


def read_draft(folder: Path) -> Draft:
    """Read a checkpoint's draft; no cache is needed.

    Args:
        folder: of `train.runs.checkpoint.find_checkpoint`.

    Raises:
        RunError: it can't be read, or its weights are not those that its config describes.
    """
    progress, page = read_training(folder)
    try:
        identity = configuration.build(Identity, page["cache"], "training.json")
        config = Qwen3Config.from_pretrained(folder)
        weights = load_file(folder / WEIGHTS)
        with torch.device("meta"):
            model = Qwen3DSparkModel(config)
        wanted = {name: w.shape for name, w in model.state_dict().items() if name not in FROZEN}
        if {name: weight.shape for name, weight in weights.items()} != wanted:
            raise ValueError(f"{WEIGHTS} has other tensors than its config says")
        export_config(config, "float32")  # nothing that it needs is missing
    except Exception as error:  # what transformers raises for a config is not of one kind
        raise damaged(folder, error) from None
    return Draft(folder, config, weights, progress, page, identity)


def export_config(config: Qwen3Config, dtype: str) -> dict[str, Any]:
    """What goes into `config.json`: nothing that is None, every name where both engines look for it.

    Args:
        dtype: of the weights, a key of `DTYPES`. SGLang takes fp16 where none is named.
    """
    rope = dict(config.rope_parameters)
    same = (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps"),
        *("attention_bias", "attention_dropout", "use_sliding_window"),
    )
    dspark = (
        *("block_size", "num_anchors", "mask_token_id", "target_layer_ids", "num_target_layers"),
        *("markov_rank", "markov_head_type", "enable_confidence_head", "confidence_head_with_markov"),
    )
    values = {
        "architectures": ["Qwen3DSparkModel"],
        "model_type": "qwen3",
        "dtype": dtype,
        "torch_dtype": dtype,  # its name before transformers 5
        **{name: getattr(config, name) for name in same},
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],  # and these two are the older way to say it
    }
    if rope.get("rope_type", "default") != "default":
        values["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    values |= {
        "layer_types": ["full_attention"] * config.num_hidden_layers,
        "tie_word_embeddings": False,
        **{name: getattr(config, name) for name in dspark},
        "sample_from_anchor": True,
        "dspark_bonus_anchor": False,
    }
    for name in ("embedding_scale", "logit_scale"):  # no engine reads the first: for our own class
        if scale_of(config, name) != 1:
            values[name] = getattr(config, name)
    if getattr(config, "final_logit_softcapping", None) is not None:
        values["final_logit_softcapping"] = config.final_logit_softcapping
    return values


def export(
    run: Path,
    folder: Path,
    to: To,
    *,
    checkpoint: str = BEST,
    dtype: str = "bfloat16",
    cache: Path | None = None,
) -> Draft:
    """Write one of a run's drafts as `to` loads it, with a model card. It appears whole or not at all.

    Says so on stderr if the engine serves no draft for the target, as far as is known.

    Args:
        folder: to be made; an empty one may be there.
        to: `hf` takes every draft; an engine refuses what it can't serve.
        checkpoint: as `train.runs.checkpoint.find_checkpoint` takes it.
        dtype: of the weights, a key of `DTYPES`.
        cache: one of the target's, to bring its embedding and head along: `embed_tokens.weight` and
            `lm_head.weight`, both `[V, H]`. Engines have them from the target.

    Returns:
        What was exported.

    Raises:
        UsageError: the engine can't serve the draft, the dtype can't hold it, or `folder` is not empty.
        RunError: there is no such checkpoint, it is damaged, or `cache` is of another target.
        WriteError: `folder` can't be written.
    """
    check_new(folder)
    draft = read_draft(find_checkpoint(run, checkpoint))
    check_engine(draft.config, to, dtype)
    weights = dict(draft.weights)
    if cache is not None:
        weights |= _embeddings(draft, CacheReader(cache))
    weights = {name: _cast(weight, name, dtype) for name, weight in weights.items()}
    calibration = _calibration(draft)
    values = export_config(draft.config, dtype)
    card = _card(draft, values, calibrated=calibration is not None, with_embeddings=cache is not None)
    with new_folder(folder, last=CONFIG) as partial:
        (partial / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        save_file(weights, partial / WEIGHTS, metadata={"format": "pt"})
        if calibration is not None:
            (partial / CALIBRATION).write_text(json.dumps(calibration, indent=1) + "\n", encoding="utf-8")
        (partial / CARD).write_text(card, encoding="utf-8")
    unknown = unknown_target(draft.trained_on.target.architecture, to)
    if unknown:
        click.echo(f"warning: {unknown}", err=True)
    return draft


def _card(draft: Draft, values: dict[str, Any], **parts: bool) -> str:
    """The model card, with whatever was measured of this checkpoint."""
    architecture = draft.trained_on.target.architecture
    last = draft.progress.evaluation  # of the run; a checkpoint between two evaluations has an older one's
    measured = last if last and last.get("step") == draft.progress.step else None
    evaluation = read_figures(draft.folder, EVALUATION) or measured
    speculation = read_figures(draft.folder, SPECULATION)
    try:
        return model_card(
            values,
            draft.page,
            draft.trained_on,
            obstacles={engine: obstacle(draft.config, engine, values["dtype"]) for engine in TARGETS},
            unknown={engine: unknown_target(architecture, engine) for engine in TARGETS},
            evaluation=evaluation,
            speculation=speculation,
            **parts,
        )
    except (TypeError, ValueError, KeyError, AttributeError, TemplateError) as error:
        raise RunError(
            f"the figures in {draft.folder} can't be read ({error}): remove {EVALUATION} and {SPECULATION} "
            "there, and measure again"
        ) from None


def _embeddings(draft: Draft, reader: CacheReader) -> dict[str, Tensor]:
    """The target's embedding and head, two tensors of their own even where it ties them."""
    ours, theirs = draft.trained_on.target, reader.manifest.identity.target
    if ours.weights != theirs.weights:
        raise RunError(
            f"{draft.folder} was trained for target {ours.name}, the cache {reader.path} holds {theirs.name} "
            "with other weights: pass --cache of its own target"
        )
    frozen = reader.frozen()
    embedding, head = (frozen[name] for name in FROZEN)
    return {FROZEN[0]: embedding.clone(), FROZEN[1]: head.clone()}


def _cast(weight: Tensor, name: str, dtype: str) -> Tensor:
    if not torch.isfinite(weight).all():
        raise RunError(f"{name} is not finite: export another checkpoint")
    cast = weight.to(DTYPES[dtype]).contiguous()
    if not torch.isfinite(cast).all():
        most = weight.abs().max().item()
        raise UsageError(f"{dtype} can't hold {name}, which reaches {most:,.0f}: export --dtype bfloat16")
    return cast


def _calibration(draft: Draft) -> dict[str, Any] | None:
    """The confidence head's temperatures as SGLang reads them (DSparkStsCalibration in dspark_sts.py).

    One positive number a slot; of the rest only what has its types, or the server would not start.
    """
    found = read_figures(draft.folder, CALIBRATION)
    if found is None:
        return None
    temperatures = read_temperatures(draft.folder, draft.config.block_size)
    kinds = {"dataset": str, "num_samples": int}
    values = {name: found[name] for name, kind in kinds.items() if type(found.get(name)) is kind}
    values |= {name: found[name] for name in ("ece_before", "ece_after") if all_numbers(found.get(name))}
    return {"temperatures": temperatures, **values}
