"""Versions of the code that trained a draft, and facts about the machine."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers

from pipeline import __version__
from train.runtime.distributed import Ranks


def code_version() -> dict[str, str]:
    """Return the versions of this project and its libraries; in a git checkout also the commit."""
    version = {"dspark-pipeline": __version__, "torch": torch.__version__}
    version["transformers"] = transformers.__version__
    root = Path(__file__).parents[2]
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
            version["commit"] = done.stdout.strip()
        except (OSError, subprocess.SubprocessError):
            pass
    return version


def machine_facts(ranks: Ranks, precision: str, attention: str) -> dict[str, Any]:
    """Return the device, ranks, precision and attention kernel of a run, as found on this machine."""
    device = ranks.device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "ranks": ranks.world,
        "precision": precision,
        "attention": attention,
        **({"threads": torch.get_num_threads()} if device.type == "cpu" else {}),
    }
