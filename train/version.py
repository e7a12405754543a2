"""Which code trained a draft."""

from __future__ import annotations

import subprocess
from pathlib import Path

import torch
import transformers

from pipeline import __version__


def code_version() -> dict[str, str]:
    """This project's version, its git commit where it runs from a checkout, and the libraries'."""
    version = {"dspark-pipeline": __version__, "torch": torch.__version__}
    version["transformers"] = transformers.__version__
    root = Path(__file__).parents[1]
    if (root / ".git").exists():
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
            version["commit"] = done.stdout.strip()
        except (OSError, subprocess.SubprocessError):
            pass
    return version
