"""Find the parts of any decoder-only Hugging Face model, and tap their outputs.

Parts are found by structure: the decoder is the module that owns both the token embedding and the
list of layers, the final norm is the norm beside them. What structure does not tell, and what configs
say under different names, is in the tables below: a new target family needs a row there, or nothing.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import TargetError
from pipeline.features import EMBEDDING_LAYER_ID

# What a list of layers is called, where a decoder owns several lists.
LAYER_NAMES = ("layers", "h", "blocks")
# What the final norm is called, where a decoder owns several norms.
NORM_NAMES = ("norm", "final_norm", "ln_f", "norm_f", "final_layernorm", "final_layer_norm")
# Final norms that are called something else, by model type.
NORM_EXCEPTIONS = {"lfm2": "embedding_norm", "lfm2_moe": "embedding_norm", "lfm3": "embedding_norm"}

# Where a config says what token embeddings are multiplied by. These and the logits' names below count only
# where the forward reads them: many configs hold some that their model ignores.
EMBEDDING_SCALES = ("embedding_multiplier", "scale_emb")
# These scale by sqrt(H) in their forward without saying so (the first two in older transformers).
SQRT_EMBEDDING_SCALE = ("gemma", "gemma2", "recurrent_gemma")
# Where a config says what logits are multiplied by, and the power it stands in.
LOGIT_SCALES = {"logit_scale": 1, "lm_head_multiplier": 1, "output_multiplier": 1, "logits_scaling": -1}
# Model types that read one of these names the other way round.
LOGIT_SCALE_EXCEPTIONS = {("hyperclovax", "logits_scaling"): 1}
# Where a config says the tanh soft-cap on logits.
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")


def _stack_of(module: nn.Module, num_layers: int | None = None) -> list[nn.Module] | None:
    """The decoder layers that `module` itself owns, in order, or None."""
    stacks = {}
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList) and len(child):
            stacks[name] = list(child)
        elif isinstance(child, nn.ModuleDict) and len(child) and all(key.isdecimal() for key in child):
            stacks[name] = [child[key] for key in sorted(child, key=int)]  # split models number their layers
    for name in LAYER_NAMES:
        if name in stacks:
            return stacks[name]
    return next((layers for layers in stacks.values() if len(layers) == num_layers), None)


def _text_config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _token_embedding(model: nn.Module) -> nn.Module | None:
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def _owners(module: nn.Module, num_layers: int | None) -> Iterator[nn.Module]:
    """Modules that own a list of layers, outermost first; layers themselves are not searched."""
    if _stack_of(module, num_layers) is not None:
        yield module
    for child in module.children():
        if not isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _owners(child, num_layers)


def find_decoder(model: nn.Module) -> nn.Module:
    """Return the module that owns the decoder layers and the final norm.

    Raises:
        TargetError: for encoder-decoders, models that read no tokens, and models whose parts are not
            found, by class name.
    """
    name = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise TargetError(
            f"{name} is an encoder-decoder: expected a decoder-only causal LM, name such a one as the target"
        )
    num_layers = getattr(_text_config(model), "num_hidden_layers", None)
    owners = list(_owners(model, num_layers))
    embedding = _token_embedding(model)
    if embedding is None:  # a bare stack of modules, as tests and other libraries make them
        if owners:
            return owners[0]
    elif getattr(getattr(embedding, "weight", None), "dim", lambda: 0)() != 2:
        raise TargetError(
            f"{name} reads no token ids (its input goes to {type(embedding).__name__}): "
            "expected a decoder-only causal LM, name such a one as the target"
        )
    else:
        inside = [owner for owner in owners if any(part is embedding for part in owner.modules())]
        if inside:
            return inside[-1]  # the innermost: towers for images and sound hold no token embedding
    raise TargetError(
        f"no decoder layers found in {name}: expected a list of layers ({', '.join(LAYER_NAMES)}) beside the "
        "token embedding; name a decoder-only causal LM, or add its names to the tables of pipeline/hooks.py"
    )


def find_layers(model: nn.Module) -> list[nn.Module]:
    """Return the decoder layers, in order. Raises TargetError as `find_decoder` does."""
    layers = _stack_of(find_decoder(model), getattr(_text_config(model), "num_hidden_layers", None))
    assert layers is not None
    return layers


def find_final_norm(model: nn.Module) -> nn.Module:
    """Return the norm whose output feeds `lm_head`. Raises TargetError where there is none."""
    decoder = find_decoder(model)
    exception = NORM_EXCEPTIONS.get(getattr(_text_config(model), "model_type", None))
    if exception and isinstance(getattr(decoder, exception, None), nn.Module):
        return getattr(decoder, exception)
    norms = {
        name: child
        for name, child in decoder.named_children()
        if ("norm" in f"{name} {type(child).__name__}".lower() or name in NORM_NAMES) and "emb" not in name
    }
    for name in NORM_NAMES:
        if name in norms:
            return norms[name]
    if len(norms) == 1:
        return next(iter(norms.values()))
    found = f"several ({', '.join(norms)})" if norms else "none"
    raise TargetError(
        f"no final norm found in {type(decoder).__name__}: expected one norm beside its layers, got {found}; "
        "name a target that has one, or add what it is called to the tables of pipeline/hooks.py"
    )


def _reads(module: nn.Module, name: str) -> bool:
    """Whether a module's own forward mentions a setting; True where its source can't be had."""
    forwards = [vars(cls)["forward"] for cls in type(module).__mro__ if "forward" in vars(cls)]
    try:
        return any(name in inspect.getsource(forward) for forward in forwards if forward is not None)
    except (OSError, TypeError):
        return True


def embedding_scale(model: nn.Module) -> float:
    """What the target multiplies token embeddings by before its first layer (Gemma: sqrt(H))."""
    embeddings, config = model.get_input_embeddings(), _text_config(model)
    scale = getattr(embeddings, "scalar_embed_scale", None)  # Gemma and BioGPT scale in the embedding module
    scale = getattr(embeddings, "embed_scale", None) if scale is None else scale
    if scale is None and config.model_type in SQRT_EMBEDDING_SCALE:
        scale = math.sqrt(config.hidden_size)
    if scale is not None:  # rounded to the dtype it computes in, as the target does
        return float(torch.tensor(float(scale), dtype=embeddings.weight.dtype))
    for name in EMBEDDING_SCALES:
        if getattr(config, name, None) and _reads(find_decoder(model), name):
            return float(getattr(config, name))
    return 1.0


def logit_scale(model: nn.Module) -> float:
    """What the target multiplies its logits by, before any soft-cap (Cohere's factor, Granite's divisor)."""
    config, scale = _text_config(model), 1.0
    for name, power in LOGIT_SCALES.items():
        if getattr(config, name, None) and _reads(model, name):
            scale *= getattr(config, name) ** LOGIT_SCALE_EXCEPTIONS.get((config.model_type, name), power)
    return float(scale)


def final_logit_softcapping(model: nn.Module) -> float | None:
    """The tanh soft-cap on the target's logits, if it has one (Gemma 2)."""
    config = _text_config(model)
    caps = (getattr(config, name, None) for name in SOFTCAPS if _reads(model, name))
    return next((float(cap) for cap in caps if cap), None)


def _tensor_of(output: Any) -> Tensor:
    return (output[0] if isinstance(output, tuple | list) else output).detach()


def learned_positions(model: nn.Module) -> int | None:
    """How many positions the target learned an embedding for (GPT-2, OPT); None where it can do with more."""
    token_embedding = _token_embedding(model)
    for name, child in find_decoder(model).named_children():
        positional = "pos" in name or name == "wpe"
        if positional and isinstance(child, nn.Embedding) and child is not token_embedding:
            return getattr(_text_config(model), "max_position_embeddings", None) or child.num_embeddings
    return None


def input_device(model: nn.Module) -> torch.device:
    """Where token ids go: the device of the embedding, also when the model is spread over several."""
    embedding = _token_embedding(model)
    if embedding is not None:
        return embedding.weight.device
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


@contextmanager
def tap_states(model: nn.Module, layer_ids: Sequence[int], *, last_hidden: bool = True) -> Iterator[dict]:
    """Collect layer outputs by id, and the post-norm state under `"last_hidden"`, in one forward.

    Yields a dict that a forward inside the block fills with detached tensors `[B, S, H]`. The
    embedding output is read where layer 0 takes it, so that scaling and position embeddings which a
    family adds outside its embedding module are in it. Hooks are removed on leaving, also on error.
    """
    layers = find_layers(model)
    states: dict[int | str, Tensor] = {}
    handles = []

    def keep(key: int | str):
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            states[key] = _tensor_of(output)

        return hook

    def keep_input(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        states[EMBEDDING_LAYER_ID] = _tensor_of(args[0] if args else kwargs["hidden_states"])

    final_id = len(layers) - 1
    try:
        for layer_id in layer_ids:
            if layer_id == EMBEDDING_LAYER_ID:
                handles.append(layers[0].register_forward_pre_hook(keep_input, with_kwargs=True))
            elif layer_id == final_id:  # the last id is the post-norm state, as in Hugging Face
                handles.append(find_final_norm(model).register_forward_hook(keep(layer_id)))
            else:
                handles.append(layers[layer_id].register_forward_hook(keep(layer_id)))
        if last_hidden:
            handles.append(find_final_norm(model).register_forward_hook(keep("last_hidden")))
        yield states
    finally:
        for handle in handles:
            handle.remove()


def check_states(
    model: nn.Module, states: dict[int | str, Tensor], keys: Sequence[int | str], shape: Sequence[int]
) -> None:
    """Check what `tap_states` collected.

    Args:
        keys: what was asked for.
        shape: of the input ids, `[B, S]`.

    Raises:
        TargetError: one is missing (the model skipped that layer) or is not `[B, S, H]`.
    """
    name = type(model).__name__
    for key in keys:
        if key not in states:
            raise TargetError(f"{name} did not run layer {key}: leave it out of the layer ids")
        got = tuple(states[key].shape)
        if len(got) != 3 or got[:2] != tuple(shape):
            raise TargetError(
                f"{name}: expected states [B, S, H] with B, S = {tuple(shape)}, got {got} at {key}: "
                "its layers pass on something else, use another target"
            )
