"""Merge a LoRA adapter into a target, in memory (needs peft)."""

from __future__ import annotations

import copy
import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from pipeline.errors import TargetError
from pipeline.target_model.notes import few
from pipeline.target_model.quantisation import quantisation
from pipeline.text import one_line

ADAPTER_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
# Settings of an adapter that is more than a sum to weights.
_NOT_MERGED = ("alora_invocation_tokens", "layer_replication", "megatron_config")
# Initialisations that take a part out of the base's weights, which loading would have to find again.
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def adapter_files(folder: Path) -> list[Path]:
    """Return an adapter's files that decide the merged weights: its config and its weights.

    Raises:
        TargetError: the directory is no adapter.
    """
    weights = [path for name in _WEIGHTS if (path := folder / name).is_file()]
    if not (folder / ADAPTER_CONFIG).is_file() or not weights:
        raise TargetError(
            f"--adapter expects a directory with {ADAPTER_CONFIG} and {_WEIGHTS[0]}, {folder} is none: give "
            "the directory that peft saved"
        )
    return [folder / ADAPTER_CONFIG, weights[0]]


def check_adapter(folder: Path, shell: nn.Module) -> None:
    """Check that an adapter fits a target, without the target's weights.

    Args:
        shell: the target on the meta device; it is left as it is.

    Raises:
        TargetError: see `merge_adapter`.
    """
    _attach(folder, copy.deepcopy(shell))


def merge_adapter(folder: Path, model: nn.Module) -> nn.Module:
    """Add an adapter to the weights of a loaded target: W + scale * B A.

    Raises:
        TargetError: peft is missing, the adapter is not LoRA, it does not fit the target in every key and
            shape, or it changes an embedding that is also the head.
    """
    adapted = _attach(folder, model)
    try:
        merged = adapted.merge_and_unload(safe_merge=True)
    except Exception as error:
        raise _refusal(folder, model, f"it can't be merged ({one_line(error)})") from None
    return merged.eval().requires_grad_(False)


def _attach(folder: Path, model: nn.Module) -> Any:
    """Return peft's model around `model`, with the adapter's weights beside the model's own."""
    files = adapter_files(folder)
    if importlib.util.find_spec("peft") is None:
        raise TargetError("--adapter needs peft: pip install 'dspark-pipeline[adapter]'")
    _check_kind(files[0])
    if quantisation(model.config) is not None:
        raise _refusal(folder, model, "the target's weights are quantised: give an unquantised --target")
    ends = {id(model.get_input_embeddings()), id(model.get_output_embeddings())}
    end_names = [name for name, module in model.named_modules() if id(module) in ends]
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    shape = model.get_input_embeddings().weight.shape
    import peft

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what it warns about is refused here
            config = peft.PeftConfig.from_pretrained(str(folder))
            stored = peft.load_peft_weights(str(folder), device="cpu")
            adapted = peft.PeftModel(model, config)
            found = adapted.load_adapter(str(folder), "default", torch_device="cpu")
            own = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    except KeyError as error:  # peft's word for a matrix that the adapter should hold whole
        raise _refusal(
            folder, model, f"1 of its tensors are missing in the adapter ({error.args[0]})"
        ) from None
    except Exception as error:
        raise _refusal(folder, model, f"peft can't load it there ({one_line(error)})") from None
    missing = set(found.missing_keys)
    if config.modules_to_save or getattr(config, "trainable_token_indices", None):
        missing |= own.keys() - stored.keys()
    for problem, names in (("missing in the adapter", missing), ("unknown there", found.unexpected_keys)):
        if names:
            raise _refusal(folder, model, f"{len(names)} of its tensors are {problem} ({few(names)})")
    plain = [name.removeprefix("base_model.model.") for name in stored]
    touched = [name for name in plain if any(name.startswith(f"{end}.") for end in end_names)]
    if tied and touched:
        raise _refusal(
            folder,
            model,
            f"it changes {touched[0]}, and embedding and head are one matrix: merge it yourself into a "
            "checkpoint with an untied head",
        )
    if adapted.get_base_model().get_input_embeddings().weight.shape != shape:
        raise _refusal(folder, model, "it has another vocabulary: merge it yourself into a checkpoint")
    return adapted


def _check_kind(path: Path) -> None:
    """Refuse an adapter that is not a sum to weights. Raises TargetError."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        kind = config["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise TargetError(f"{path} can't be read ({one_line(error)}): expected peft's own file") from None
    special = [name for name in _NOT_MERGED if config.get(name)]
    first = str(config.get("init_lora_weights"))
    special += [f"init_lora_weights {first}"] if first.startswith(_CHANGE_THE_BASE) else []
    if kind != "LORA" or special:
        raise TargetError(
            f"{path.parent}: expected a LoRA adapter, got {', '.join([kind, *special])}: "
            "merge it yourself and give the result as --target"
        )


def _refusal(folder: Path, model: nn.Module, why: str) -> TargetError:
    return TargetError(f"adapter {folder} does not fit {type(model).__name__}: {why}")
