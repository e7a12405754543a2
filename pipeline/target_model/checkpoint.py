"""Prove that a checkpoint holds every weight of a model, as transformers itself matches names and shapes.

`check_stored` reads only the headers of the files; `check_loading` judges what a load reports.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import TargetError
from pipeline.target_model.notes import few, warn_once
from pipeline.target_model.quantisation import refuse_narrow
from pipeline.text import one_line

# Arguments with which `from_pretrained` returns a report beside the model, mismatches included.
REPORTED: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
# The files that transformers reads, in its order of preference.
_SINGLE = ("model.safetensors", "pytorch_model.bin")
# What quantisers store beside a weight.
_LEFTOVER = re.compile(r"scale|zero|qweight|packed|g_idx|absmax|amax|quant_map|quant_state|quantizer|SCB")
# Scales of a quantised key-value cache: the weights are whole without them.
_CACHE_SCALES = ("k_scale", "v_scale", "q_scale", "kv_scale")
_COMPUTED = (torch.bfloat16, torch.float16, torch.float32)
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "BOOL": torch.bool}
_DTYPES |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}


def stored_tensors(directory: Path) -> dict[str, Tensor] | None:
    """Read names, shapes and dtypes of a checkpoint's tensors from the headers of its files.

    Returns:
        Tensors on the meta device by name; None if there is no checkpoint in a form that has headers.

    Raises:
        TargetError: a file that the index names is missing, or a file is damaged.
    """
    for name in _SINGLE:
        index = directory / f"{name}.index.json"
        if (directory / name).is_file():
            return _headers([directory / name])
        if index.is_file():
            return _headers(_shards(index))
    return None


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise TargetError(f"{index} can't be read ({one_line(error)}): download it again") from None
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise TargetError(
            f"{index.parent}: {len(missing)} of the {len(names)} files that {index.name} names are missing "
            f"({few(missing)}): download the checkpoint again"
        )
    return [index.parent / name for name in names]


def _headers(paths: Iterable[Path]) -> dict[str, Tensor] | None:
    tensors: dict[str, Tensor] = {}
    for path in paths:
        found = _safetensors_header(path) if path.suffix == ".safetensors" else _pickle_header(path)
        if found is None:
            return None
        tensors |= found
    return tensors


def _safetensors_header(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    tensors = {}
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - the file itself is not iterable
                part = file.get_slice(name)
                dtype = _DTYPES.get(part.get_dtype(), torch.uint8)
                tensors[name] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
    except (OSError, SafetensorError) as error:
        raise TargetError(
            f"the target can't be loaded: {path} is damaged ({one_line(error)}): download it again"
        ) from None
    return tensors


def _pickle_header(path: Path) -> dict[str, Tensor] | None:
    """Read a .bin file without its values; None for the old form, which has no header."""
    try:
        stored = torch.load(path, map_location="meta", weights_only=True, mmap=True)
    except Exception:  # the load itself says what is wrong
        return None
    return {name: value for name, value in stored.items() if isinstance(value, Tensor)}


def check_stored(directory: Path, config: Any, shell: nn.Module, dtype: torch.dtype) -> None:
    """Check an unquantised checkpoint by a load without values: on the meta device, from the headers.

    Where that can't be done (a GGUF file, an old .bin, no accelerate), the load itself is the first check.

    Raises:
        TargetError: weights are missing, of another shape, or quantised with no word in config.json.
    """
    tensors = stored_tensors(directory)
    if tensors is None:
        return
    refuse_narrow(directory, tensors)
    if importlib.util.find_spec("accelerate") is None:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _, report = type(shell).from_pretrained(
                None,
                config=copy.deepcopy(config),
                state_dict=tensors,
                dtype=dtype,
                device_map={"": "meta"},
                **REPORTED,
            )
    except Exception:  # own code may not take a state_dict
        return
    check_loading(directory, shell, report)


def check_loading(directory: Path, model: nn.Module, report: Mapping[str, Any]) -> None:
    """Judge transformers' report of a load: every weight must have come from the checkpoint.

    Tensors that the model does not use are named on stderr, once.

    Args:
        report: what `from_pretrained` returns with `REPORTED`.

    Raises:
        TargetError: missing or mismatched weights, or leftovers of a quantisation that was not undone.
    """
    name = type(model).__name__
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    leftovers = [key for key in unexpected if _is_leftover(key, model)]
    if leftovers:
        raise TargetError(
            f"{directory}: the checkpoint is quantised in a form that transformers does not undo: it has "
            f"{len(leftovers)} tensors such as {few(leftovers)}, which {name} would leave out: give the "
            "unquantised checkpoint"
        )
    if missing:
        instead = f"; it has {len(unexpected)} others ({few(unexpected)})" if unexpected else ""
        raise TargetError(
            f"{directory}: {len(missing)} weights of {name} are missing in the checkpoint "
            f"({few(missing)}){instead}: they would be random; download the checkpoint again, or give the "
            "config.json that belongs to it"
        )
    mismatched = sorted(report["mismatched_keys"])
    if mismatched:
        key, stored, wanted = mismatched[0]
        raise TargetError(
            f"{directory}: {len(mismatched)} weights of the checkpoint have another shape than {name}'s "
            f"({key}: stored {list(stored)}, expected {list(wanted)}): give the right config.json"
        )
    if unexpected:
        warn_once(f"{directory}: {name} leaves out {len(unexpected)} tensors ({few(unexpected)})")


def check_loaded(
    directory: Path, model: nn.Module, shell: nn.Module, dtype: torch.dtype, *, quantised: bool = False
) -> None:
    """Check the loaded model's own tensors: all have values, and embedding and head are plain matrices.

    Raises:
        TargetError: values are missing, the head is tied in config.json only, or a matrix is quantised.
    """
    held = [*model.named_parameters(), *model.named_buffers()]
    empty = [key for key, tensor in held if tensor.device.type == "meta"]
    if empty:
        raise TargetError(
            f"{directory}: {len(empty)} tensors have no values after loading ({few(empty)}): use another one"
        )
    if quantised:
        _check_ends(directory, model, shell, dtype)
    (embedding, head), ends = _ends(model), _ends(shell)
    if ends[0] is ends[1] and head is not embedding and not torch.equal(head.to(embedding.device), embedding):
        raise TargetError(
            f"{directory}: config.json ties the head to the embedding, but the checkpoint has another head: "
            'set "tie_word_embeddings": false in config.json'
        )


def _check_ends(directory: Path, model: nn.Module, shell: nn.Module, dtype: torch.dtype) -> None:
    """Check that a quantised target's embedding and head are plain matrices. Raises TargetError."""
    for part, weight, plain in zip(("embedding", "head"), _ends(model), _ends(shell), strict=True):
        if weight is None or weight.dtype not in _COMPUTED or weight.shape != plain.shape:
            raise TargetError(
                f"{directory}: its {part} is quantised too, and drafts need a plain matrix: give the "
                "unquantised checkpoint"
            )
        if weight.dtype != dtype:
            raise TargetError(
                f"{directory}: its quantised weights compute in {_short(weight.dtype)}, not {_short(dtype)}: "
                f"give --dtype {_short(weight.dtype)}"
            )


def _ends(model: nn.Module) -> tuple[Tensor, Tensor]:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return getattr(embedding, "weight", None), getattr(head, "weight", None)


def refuse_offload(directory: Path, model: nn.Module, device: torch.device) -> None:
    """Refuse a target that accelerate put partly on the CPU or disk: slow, and its head can't be read.

    Raises:
        TargetError: with the number of parts that the GPUs do not hold.
    """
    places = [str(place) for place in getattr(model, "hf_device_map", {}).values()]
    outside = [place for place in places if place == "disk" or (place == "cpu" and device.type != "cpu")]
    if outside:
        raise TargetError(
            f"{directory}: the target does not fit the GPUs, {len(outside)} of its {len(places)} parts "
            f"are on {' and '.join(sorted(set(outside)))}: use more GPUs, or a smaller --dtype"
        )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_leftover(key: str, model: nn.Module) -> bool:
    """Tell whether an unused tensor belongs to a quantised weight of one of the model's own modules.

    A layer or tower that the model does not have at all (next-token heads, encoders) is no matter. Names may
    begin at the base model, as its own checkpoint has them.
    """
    *path, last = key.split(".")
    if last in _CACHE_SCALES or not _LEFTOVER.search(".".join([*path[-2:], last])):
        return False
    return any(_reaches(root, path) for root in (model, getattr(model, model.base_model_prefix, None)))


def _reaches(root: nn.Module | None, path: Sequence[str]) -> bool:
    """Tell whether a path of module names leads into a layer of `root`, or to a module with weights."""
    module, depth = root, 0
    for part in path:
        found = getattr(module, "_modules", {}).get(part)
        if found is None:
            break
        module, depth = found, depth + 1
    if module is None or not depth:
        return False
    inside_a_layer = any(part.isdigit() for part in path[:depth]) and not isinstance(module, nn.ModuleList)
    return inside_a_layer or next(module.parameters(recurse=False), None) is not None
