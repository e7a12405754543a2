"""A target that transformers splits over several processes: tensor parallelism by the family's own plan."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pipeline.errors import UsageError
from pipeline.target_model.quantisation import quantisation

if TYPE_CHECKING:
    from pipeline.target_model.load import Target

_OTHER_ENGINE = "give the target's plain weights, or --engine vllm"


def split_arguments(ranks: int) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` that split a model over the ranks of the process group."""
    if ranks == 1:
        return {}
    try:
        from transformers.distributed import DistributedConfig
    except ImportError:
        return {"tp_plan": "auto", "tp_size": ranks}
    if all(field.name != "tp_size" for field in fields(DistributedConfig)):  # until transformers 5.7
        return {"tp_plan": "auto", "tp_size": ranks}
    return {"distributed_config": DistributedConfig(tp_size=ranks)}


def check_split(target: Target, ranks: int) -> None:
    """Refuse a target that transformers can't split over so many ranks.

    Raises:
        UsageError: naming the option or the family, and what to do instead.
    """
    kind, device = split_device(0).type, target.options.device
    if device not in ("auto", kind):
        raise UsageError(
            f"--tensor-parallel {ranks} gives each process a {kind} device of its own here, not --device "
            f"{device}: drop --device (for the CPU, hide the GPUs: CUDA_VISIBLE_DEVICES=)"
        )
    config = target.config.get_text_config()
    name = f"{type(target.shell).__name__} (model type {target.config.model_type})"
    if quantisation(target.config) is not None:
        raise UsageError(
            f"--tensor-parallel {ranks}: {target.name} has quantised weights, which are not split here: "
            f"{_OTHER_ENGINE}"
        )
    if not getattr(config, "base_model_tp_plan", None):
        raise UsageError(
            f"--tensor-parallel {ranks}: transformers has no plan to split {name}: spread it over the GPUs "
            "with --device-map auto in one process, or give --engine vllm"
        )
    for what in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, what, None)
        if isinstance(heads, int) and heads % ranks:
            fitting = [n for n in range(2, ranks) if heads % n == 0]
            instead = f"give --tensor-parallel {fitting[-1]}" if fitting else "drop --tensor-parallel"
            raise UsageError(
                f"--tensor-parallel {ranks} does not divide the {heads} {what} of {name}: {instead}"
            )


def whole_ends(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Return a split model's token embedding and head `[V, H]`, gathered. All ranks call it together.

    A tied head is the embedding itself.
    """
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    gathered = whole(embedding)
    return gathered, gathered if head is embedding else whole(head)


def whole(weight: Tensor) -> Tensor:
    """Return a weight unsharded, as a plain tensor. All ranks of a sharded one call it together."""
    weight = weight.detach()
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def is_split(state: Tensor) -> bool:
    """Return whether a tensor holds only this rank's part of its values."""
    return isinstance(state, DTensor) and not all(place.is_replicate() for place in state.placements)


def split_device(local_rank: int) -> torch.device:
    """Return the device of a process's part of a split target: transformers takes the accelerator's."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if found is None else torch.device(found.type, local_rank)
