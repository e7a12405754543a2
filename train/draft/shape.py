"""Hugging Face config of a run's draft of any kind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from pipeline.cache import CacheReader
from pipeline.errors import CacheError
from pipeline.text import one_line
from train.config import DraftConfig, RunConfig
from train.draft import DRAFTS


def draft_shape(reader: CacheReader, config: RunConfig) -> PretrainedConfig:
    """Return the Hugging Face config of a run's draft.

    Raises:
        CacheError: the config asks for a layer that the cache lacks.
        ConfigError: the settings fit no draft for this target.
    """
    layer_ids = reader.require_layers(config.draft.target_layer_ids or reader.layer_ids)
    target = read_target_config(reader.path / "target")
    anchors = config.train.anchors_per_batch
    return DRAFTS[config.draft.kind].config(config.draft, target, reader.manifest, layer_ids, anchors)


def resolved(draft: DraftConfig, shape: PretrainedConfig) -> DraftConfig:
    """Return `[draft]` with the settings filled in that the cache and its target decide."""
    values = {name: getattr(shape, name) for name in DRAFTS[draft.kind].resolved}
    return replace(draft, **{n: tuple(v) if isinstance(v, list) else v for n, v in values.items()})


def read_target_config(folder: Path) -> PretrainedConfig:
    """Read the target's own config from a cache's `target/`. Code that comes with it is not run.

    Raises:
        CacheError: the config can't be read.
    """
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        reason = one_line(error)
    try:  # an unknown model type with its own code: read the dimensions by their usual names
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if "auto_map" in values:
            return PretrainedConfig.from_dict(values.get("text_config", values))
    except (OSError, ValueError, AttributeError):
        pass
    raise CacheError(f"{folder / 'config.json'} can't be read ({reason}): capture again")
