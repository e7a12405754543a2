"""The few weights of a target that a capture needs beside its engine: embedding, head and final norm.

The engine holds the target in its own process, perhaps split over GPUs and quantised. These three are read
from the checkpoint, by the names that transformers gives them.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pipeline.errors import TargetError
from pipeline.hooks import find_final_norm
from pipeline.target_model.checkpoint import stored_tensors
from pipeline.target_model.load import Target
from pipeline.text import one_line

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
# Dtypes of values that are weights as they are. Narrower ones have scales elsewhere.
_PLAIN = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class FrozenWeights:
    """Embedding, head and final norm in the dtype that the target computes in."""

    embedding: Tensor
    """`[V, H]` on the CPU."""
    head: Tensor
    """`[V, H]` on the target's device; the embedding itself if they are tied and that is the CPU."""
    norm: nn.Module
    """The target's own final norm, on its device."""


def frozen_weights(target: Target) -> FrozenWeights:
    """Read them.

    Raises:
        TargetError: the checkpoint is not safetensors, or one of them is missing or quantised.
    """
    shell, names = target.shell, {}
    for name, parameter in shell.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), name)
    stored = (stored_tensors(target.directory) or {}) if _has_safetensors(target.directory) else {}

    def read(parameter: Tensor) -> Tensor:
        found = _read(target.directory, _stored_name(target, names[id(parameter)], parameter, stored))
        return found.to(target.dtype)

    embedding, output = shell.get_input_embeddings().weight, shell.get_output_embeddings().weight
    table = read(embedding)
    head = (table if output is embedding else read(output)).to(target.device)
    own = find_final_norm(shell)
    norm = copy.deepcopy(own).to_empty(device=target.device)
    with torch.no_grad():
        for name, parameter in own.named_parameters():
            norm.get_parameter(name).copy_(read(parameter))
    if list(own.named_buffers()):
        raise TargetError(
            f"{target.name}: its final norm has values that no checkpoint holds: use another target"
        )
    return FrozenWeights(table, head, norm.eval().requires_grad_(False))


def _stored_name(target: Target, name: str, parameter: Tensor, stored: dict[str, Tensor]) -> str:
    """Return the checkpoint's name of a parameter: the same, or the only one with the longest common end."""
    parts = name.split(".")
    for start in range(len(parts) - 1):
        end = ".".join(parts[start:])
        found = [key for key in stored if key == end or key.endswith(f".{end}")]
        if name in found:
            found = [name]
        if len(found) > 1:
            break
        if found and stored[found[0]].shape == parameter.shape and stored[found[0]].dtype in _PLAIN:
            return found[0]
    raise TargetError(
        f"{target.directory}: no {name} {list(parameter.shape)} in its safetensors files, as plain values: "
        "--engine vllm reads embedding, head and final norm from there; use another checkpoint of the target"
    )


def _has_safetensors(directory: Path) -> bool:
    return any((directory / name).is_file() for name in (_SINGLE, _INDEX))


def _read(directory: Path, name: str) -> Tensor:
    """Read one tensor of a safetensors checkpoint."""
    index, single = directory / _INDEX, directory / _SINGLE
    try:
        if single.is_file():
            file = single
        else:
            file = directory / json.loads(index.read_text(encoding="utf-8"))["weight_map"][name]
        with safe_open(file, "pt") as tensors:
            return tensors.get_tensor(name)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise TargetError(
            f"{directory}: {name} can't be read ({one_line(error)}): download it again"
        ) from None
