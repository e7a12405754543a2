"""Export a trained draft in the layout that inference engines load: `dspark export`.

    DIR/config.json         the draft's config with the names that engines read
        model.safetensors   the draft's weights, without a prefix; the target's embedding and head on request
        README.md           the model card
        calibration.json    temperatures of the confidence head, if `dspark calibrate` was run
        draft-TYPE.gguf     the draft as llama.cpp loads it, on request

What an engine can't serve is refused before anything is written: engines load much of it without an error,
and then accept hardly any token.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from pipeline.cache import CacheReader
from pipeline.errors import UsageError
from pipeline.files import check_new, new_folder
from pipeline.remote.address import Place
from train.draft.vocabulary import kept_tokens
from train.export import speculators
from train.export.engines import VERSIONS, check_engine, obstacle, unknown_target
from train.export.gguf import check_gguf_package, read_tokenizer, write_gguf
from train.export.model_card import model_card
from train.runs.checkpoint import FROZEN
from train.runs.names import BEST, CALIBRATION, WEIGHTS
from train.runs.open import TrainedDraft, open_draft
from train.runs.results import (
    as_evaluation,
    read_calibration,
    read_evaluation,
    read_speculation,
    read_temperatures,
)
from train.runtime.console import warn

CARD = "README.md"
CONFIG = "config.json"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
To = Literal["hf", "vllm", "sglang", "llama.cpp", "tensorrt-llm", "speculators"]


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file to write beside the weights. It is made from the run's weights, not from rounded ones."""

    file_type: str
    """Type of its matrices, a key of `train.export.gguf.FILE_TYPES`."""
    target: Path
    """GGUF file of the target."""

    @property
    def name(self) -> str:
        """Name of the file."""
        return f"draft-{self.file_type}.gguf"

    def tokenizer(self, draft: TrainedDraft, weights: dict[str, Tensor]) -> dict[str, tuple[Any, ...]]:
        """Return the target's tokenizer. Raise UsageError if it or the file can't be had."""
        check_gguf_package()
        if self.file_type == "f16":
            for name, weight in weights.items():
                _cast(weight, name, "float16")
        sizes = {"vocab_size": draft.target.vocab_size, "hidden_size": draft.target.hidden_size}
        return read_tokenizer(self.target, **sizes)


def export_config(draft: TrainedDraft, dtype: str) -> dict[str, Any]:
    """Return the values of `config.json`: none is None, and each has the names that both engines read.

    Args:
        dtype: dtype of the weights, a key of `DTYPES`. Without it SGLang would load fp16.
    """
    return {
        "architectures": draft.shape.architectures,
        "dtype": dtype,
        "torch_dtype": dtype,  # name of dtype before transformers 5
        **draft.kind.exported(draft.shape),
    }


def export(
    run: Path,
    folder: Path,
    to: To,
    *,
    checkpoint: str = BEST,
    dtype: str = "bfloat16",
    cache: Place | None = None,
    gguf: GgufFile | None = None,
) -> TrainedDraft:
    """Export one of a run's drafts, with a model card. The folder appears complete or not at all.

    Warns on stderr if the engine is not known to serve drafts for the target.

    Args:
        folder: created; may exist if it is empty.
        to: `hf` takes every draft; an engine refuses what it can't serve.
        checkpoint: as in `train.runs.open.find_checkpoint`.
        dtype: dtype of the weights, a key of `DTYPES`.
        cache: cache of the target, to include its embedding and head: `embed_tokens.weight` and
            `lm_head.weight`, both `[V, H]`. None leaves them out; engines use the target's own.
        gguf: the file for llama.cpp that comes along.

    Returns:
        The exported draft.

    Raises:
        UsageError: the engine can't serve the draft, a dtype can't hold it, `folder` is not empty, or the
            target's GGUF file can't be read.
        RunError: there is no such checkpoint, it is damaged, or `cache` is of another target.
        WriteError: `folder` can't be written.
    """
    check_new(folder)
    draft = open_draft(run, checkpoint)
    weights = dict(draft.weights)
    doubled = cache is not None and "d2t" not in weights
    rules = dict(draft.kind.rules)
    if gguf is not None:
        rules[to] = draft.kind.gguf.rules
    check_engine(rules, draft.shape, to, dtype, embeddings=doubled)
    if cache is None and "d2t" in weights and FROZEN[1] not in weights:
        raise UsageError(
            f"{run} drafts {len(weights['d2t']):,} of the target's tokens, so engines need those rows of the "
            "target's head: pass --with-embeddings --cache CACHE, a cache of its target"
        )
    if cache is not None:
        weights |= _embeddings(draft, CacheReader(cache))
    tokenizer = gguf and gguf.tokenizer(draft, weights)
    cast = {name: _cast(weight, name, dtype) for name, weight in weights.items()}
    calibration = _calibration(draft)
    values = export_config(draft, dtype)
    if to == speculators.FORM:
        values = speculators.speculators_config(draft, dtype)
        cast = draft.kind.speculators.weights(cast)
    card = _card(
        draft,
        dtype,
        to,
        {e: obstacle(rules, draft.shape, e, dtype, embeddings=doubled) for e in VERSIONS},
        calibrated=calibration is not None,
        with_embeddings=cache is not None,
        gguf=gguf and gguf.name,
    )
    with new_folder(folder, last=CONFIG) as partial:
        (partial / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        save_file(cast, partial / WEIGHTS, metadata={"format": "pt"})
        if calibration is not None:
            (partial / CALIBRATION).write_text(json.dumps(calibration, indent=1) + "\n", encoding="utf-8")
        (partial / CARD).write_text(card, encoding="utf-8")
        if gguf is not None:
            path = partial / gguf.name
            write_gguf(path, draft.kind.gguf, values, weights, tokenizer, gguf.file_type, folder.resolve())
    unknown = unknown_target(draft.kind.targets, draft.target.architecture, to)
    if unknown:
        warn(unknown)
    return draft


def _card(draft: TrainedDraft, dtype: str, to: To, obstacles: dict[str, str], **parts: Any) -> str:
    """Write the model card, with whatever was measured of this checkpoint."""
    architecture, measured = draft.target.architecture, draft.page.progress.measured
    evaluation = read_evaluation(draft.folder) or (as_evaluation(measured) if measured else None)
    if to == speculators.FORM:
        obstacles |= {engine: speculators.UNREAD for engine in VERSIONS if engine != speculators.READER}
    return model_card(
        draft.page,
        kind=draft.kind,
        shape=draft.shape,
        dtype=dtype,
        obstacles=obstacles,
        unknown={engine: unknown_target(draft.kind.targets, architecture, engine) for engine in VERSIONS},
        evaluation=evaluation,
        speculation=read_speculation(draft.folder),
        **parts,
    )


def _embeddings(draft: TrainedDraft, reader: CacheReader) -> dict[str, Tensor]:
    """Return the target's embedding and head, as separate tensors even if the target ties them."""
    draft.require_target_of(reader)
    frozen = reader.frozen()
    with torch.device("meta"):
        model = draft.kind.build(draft.shape)
    tensors = {name: frozen[name].clone() for name in model.frozen}
    if "d2t" in draft.weights and FROZEN[1] in tensors:
        tensors[FROZEN[1]] = tensors[FROZEN[1]][kept_tokens(draft.weights["d2t"])]
    return tensors


def _cast(weight: Tensor, name: str, dtype: str) -> Tensor:
    if not weight.is_floating_point():
        return weight.contiguous()
    cast = weight.to(DTYPES[dtype]).contiguous()
    if not torch.isfinite(cast).all():
        most = weight.abs().max().item()
        raise UsageError(f"{dtype} can't hold {name}, which reaches {most:,.0f}: export --dtype bfloat16")
    return cast


def _calibration(draft: TrainedDraft) -> dict[str, Any] | None:
    """Return the confidence head's temperatures as SGLang reads them (DSparkStsCalibration in dspark_sts.py).

    One positive number per position. Other fields come along only if they have SGLang's types: with a wrong
    one the server would not start.
    """
    temperatures = read_temperatures(draft.folder, draft.kind.slots(draft.shape))
    if temperatures is None:
        return None
    found = read_calibration(draft.folder, skip_misfits=True)
    names = ("dataset", "num_samples", "ece_before", "ece_after")
    values = {name: getattr(found, name) for name in names}
    return {"temperatures": temperatures, **{k: v for k, v in values.items() if v is not None}}
