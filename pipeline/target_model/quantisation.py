"""Refuse quantised checkpoints that transformers would load without undoing the quantisation."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import TargetError
from pipeline.text import one_line

_REMEDY = "give the unquantised checkpoint"
# Files in which quantisers describe themselves when they leave config.json as it is.
_OWN_CONFIGS = (
    "hf_quant_config.json",
    "quantize_config.json",
    "quant_config.json",
    "quantization_config.json",
)
# Buffers of old checkpoints with narrow values.
_NO_WEIGHTS = ("bias", "mask", "position")


def quantisation(config: Any) -> dict[str, Any] | None:
    """Return the quantisation that transformers reads from a config; None for plain weights."""
    for holder in (config, config.get_text_config(decoder=True)):
        found = getattr(holder, "quantization_config", None)
        if found:
            return dict(found) if isinstance(found, Mapping) else found.to_dict()
    return None


def check_quantisation(directory: Path, config: Any) -> None:
    """Check that transformers knows how a checkpoint was quantised, and has the packages to read it.

    Raises:
        TargetError: naming the method, and the package or another remedy.
    """
    found = quantisation(config)
    if found is None:
        _refuse_undeclared(directory, config)
        return
    from transformers.quantizers import AutoHfQuantizer

    method = found.get("quant_method")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            known = AutoHfQuantizer.supports_quant_method(found)
            if known:
                quantizer = AutoHfQuantizer.from_config(dict(found), pre_quantized=True)
                quantizer.validate_environment(device_map=None, weights_only=True)
    except ImportError as error:
        raise TargetError(
            f"{directory}: its weights are quantised ({method}), and a package that reads them is not "
            f"installed ({one_line(error)}): install it, or {_REMEDY}"
        ) from None
    except Exception as error:
        if method is not None:
            return  # such as no GPU on this machine: the load decides
        raise TargetError(
            f"{directory}: its quantization_config can't be read ({one_line(error)}): {_REMEDY}"
        ) from None
    if not known:
        raise TargetError(
            f"{directory}: its weights are quantised by a method that transformers does not know "
            f"({method!r}): {_REMEDY}"
        )


def _refuse_undeclared(directory: Path, config: Any) -> None:
    """Refuse a quantisation that only a file beside config.json, or a field that nobody reads, declares."""
    if getattr(config, "compression_config", None):
        raise TargetError(
            f'{directory}: config.json describes its quantisation as "compression_config", which '
            f'transformers does not read: rename it to "quantization_config", or {_REMEDY}'
        )
    for name in _OWN_CONFIGS:
        try:
            found = json.loads((directory / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if not isinstance(found, dict):
            continue
        inner = found.get("quantization")
        method = inner.get("quant_algo") if isinstance(inner, dict) else found.get("quant_method", "unnamed")
        if method:
            raise TargetError(
                f"{directory}: {name} says that its weights are quantised ({method}), but config.json has no "
                f"quantization_config, so transformers would not undo it: {_REMEDY}"
            )


def refuse_narrow(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse matrices of 8-bit values in a checkpoint whose config names no quantisation.

    Raises:
        TargetError: naming some.
    """
    narrow = [
        name
        for name, tensor in tensors.items()
        if tensor.element_size() == 1 and tensor.dtype != torch.bool and tensor.ndim >= 2
        if not any(word in name for word in _NO_WEIGHTS)
    ]
    if narrow:
        kind = str(tensors[narrow[0]].dtype).removeprefix("torch.")
        raise TargetError(
            f"{directory}: {len(narrow)} weights are stored in {kind} (such as {narrow[0]}), but config.json "
            f"has no quantization_config that says how to read them: {_REMEDY}"
        )
