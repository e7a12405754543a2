"""Runs to export, some changed by hand, for tests of exports and imports."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import run_ok
from tests.train.runs import train_arguments

# Settings of a small draft of each kind.
KINDS: dict[str, dict[str, Any]] = {
    "dspark": {},
    "dflash": {"draft__kind": "dflash", "draft__markov_rank": None, "draft__block_size": 4},
    "dflash2": {
        "draft__kind": "dflash2",
        "draft__markov_rank": None,
        "draft__block_size": 4,
        "draft__selector_rank": 8,
        "draft__selector_top_k": 5,
    },
    "eagle3": {
        "draft__kind": "eagle3",
        **dict.fromkeys(("draft__markov_rank", "draft__block_size", "draft__num_layers")),
        "draft__ttt_steps": 3,
        "draft__norm_output": "true",
    },
}


def changed(run: Path, copy: Path, **fields: Any) -> Path:
    """A copy of a run whose latest checkpoint's config says something else; None takes a field away."""
    shutil.copytree(run, copy, symlinks=True)
    change_json(copy / "latest" / "config.json", **fields)
    return copy


def change_json(path: Path, **fields: Any) -> None:
    """Set fields of a JSON object; None takes one away."""
    values = json.loads(path.read_text()) | fields
    values = {name: value for name, value in values.items() if name not in fields or value is not None}
    path.write_text(json.dumps(values))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a directory, the model card apart."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "README.md"}


def change_identity(run: Path, **target: Any) -> None:
    """Set fields of the target in a run's latest checkpoint, as if its cache had been of another one."""
    path = run / "latest" / "training.json"
    page = json.loads(path.read_text())
    page["cache"]["target"] |= target
    path.write_text(json.dumps(page))


def trained(folder: Path, cache: Path, **settings) -> Path:
    """Train a small draft for a few steps."""
    run_ok(*train_arguments(cache, folder, train__max_steps=3, **settings))
    return folder


def front_matter(card: str) -> dict:
    """Read the YAML header of a model card."""
    _, header, _ = card.split("---\n", 2)
    return yaml.safe_load(header)
