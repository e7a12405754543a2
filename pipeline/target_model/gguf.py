"""Packages and arguments that read a GGUF file."""

from __future__ import annotations

import importlib.util
from typing import Any

from pipeline.errors import TargetError


def gguf_options(gguf_file: str | None) -> dict[str, Any]:
    """Return the arguments with which transformers' `from_pretrained` reads a GGUF file as plain weights.

    Raises:
        TargetError: the packages that read it are not installed.
    """
    if gguf_file is None:
        return {}
    need("gguf", "accelerate", reason="--gguf-file")
    import transformers

    if hasattr(transformers, "GgufConfig"):  # newer versions keep weights packed by default
        return {
            "gguf_file": gguf_file,
            "quantization_config": transformers.GgufConfig(dequantize=True),
        }
    return {"gguf_file": gguf_file}


def need(*packages: str, reason: str) -> None:
    """Raise TargetError, with the command that installs them, if packages are missing."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise TargetError(f"{reason} needs {', '.join(missing)}: pip install {' '.join(missing)}")
