"""Which code trained a draft, and on what."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers

from pipeline import __version__
from train.runtime.distributed import Ranks


def code_version() -> dict[str, str]:
    """This project's version, its git commit where it runs from a checkout, and the libraries'."""
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
    """What a run computes on, which its config leaves to be found out."""
    device = ranks.device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "ranks": ranks.world,
        "precision": precision,
        "attention": attention,
        **({"threads": torch.get_num_threads()} if device.type == "cpu" else {}),
    }
