"""Find the parts of any decoder-only Hugging Face model, and tap their outputs.

Parts are found by structure: the decoder is the module that owns both the token embedding and the list of
layers; the final norm is the norm beside them. The tables below hold names that structure does not tell, and
settings that configs name differently: a new target family needs a row there, or nothing.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, masking_utils

from pipeline.errors import TargetError
from pipeline.features import EMBEDDING_LAYER_ID

# Names of the list of layers, for decoders that own several lists.
LAYER_NAMES = ("layers", "h", "blocks")
# Names of the final norm, for decoders that own several norms.
NORM_NAMES = ("norm", "final_norm", "ln_f", "norm_f", "final_layernorm", "final_layer_norm")
# Other names of the final norm, by model type.
NORM_EXCEPTIONS = {"lfm2": "embedding_norm", "lfm2_moe": "embedding_norm", "lfm3": "embedding_norm"}

# Functions of transformers that look into the rows of a forward, in versions that have them. They are kept
# from the start, so that forwards in several threads can't put each other's stand-in back for good.
_LOOKS = tuple(
    (owner, name, getattr(owner, name))
    for owner, name in (
        (masking_utils, "find_packed_sequence_indices"),
        (PreTrainedModel, "warn_if_padding_and_no_attention_mask"),
    )
    if hasattr(owner, name)
)
# Config names of the factor on token embeddings. These and the names for logits below count only if the
# forward reads them, because many configs have some that their model ignores.
EMBEDDING_SCALES = ("embedding_multiplier", "scale_emb")
# Model types that multiply by sqrt(H) in their forward, not by config (the first two in older transformers).
SQRT_EMBEDDING_SCALE = ("gemma", "gemma2", "recurrent_gemma")
# Config names of the factor on logits, with its exponent: -1 for a divisor.
LOGIT_SCALES = {"logit_scale": 1, "lm_head_multiplier": 1, "output_multiplier": 1, "logits_scaling": -1}
# Model types with another exponent.
LOGIT_SCALE_EXCEPTIONS = {("hyperclovax", "logits_scaling"): 1}
# Config names of the tanh soft-cap on logits.
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap")


def _stack_of(module: nn.Module, num_layers: int | None = None) -> list[nn.Module] | None:
    """Return the decoder layers that `module` itself owns, in order, or None."""
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
    """Yield the modules that own a list of layers, outermost first. Layers themselves are not searched."""
    if _stack_of(module, num_layers) is not None:
        yield module
    for child in module.children():
        if not isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _owners(child, num_layers)


def find_decoder(model: nn.Module) -> nn.Module:
    """Return the module that owns the decoder layers and the final norm.

    Raises:
        TargetError: an encoder-decoder, a model that reads no tokens, or one whose parts are not found.
    """
    name = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise TargetError(f"{name} is an encoder-decoder: pass a decoder-only causal LM")
    num_layers = getattr(_text_config(model), "num_hidden_layers", None)
    owners = list(_owners(model, num_layers))
    embedding = _token_embedding(model)
    if embedding is None:  # a bare stack of modules, as tests and other libraries make them
        if owners:
            return owners[0]
    elif getattr(getattr(embedding, "weight", None), "dim", lambda: 0)() != 2:
        raise TargetError(
            f"{name} reads no token ids (its input goes to {type(embedding).__name__}): "
            "pass a decoder-only causal LM"
        )
    else:
        inside = [owner for owner in owners if any(part is embedding for part in owner.modules())]
        if inside:
            return inside[-1]  # the innermost: towers for images and sound hold no token embedding
    raise TargetError(
        f"no decoder layers found in {name}: expected a list of layers ({', '.join(LAYER_NAMES)}) beside the "
        "token embedding; pass a decoder-only causal LM, or add its names to the tables of pipeline/hooks.py"
    )


def find_layers(model: nn.Module) -> list[nn.Module]:
    """Return the decoder layers, in order. Raises TargetError as `find_decoder` does."""
    layers = _stack_of(find_decoder(model), getattr(_text_config(model), "num_hidden_layers", None))
    assert layers is not None
    return layers


def find_final_norm(model: nn.Module) -> nn.Module:
    """Return the norm whose output feeds `lm_head`. Raises TargetError if there is none, or several."""
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
        "pass a target that has one, or add its name to the tables of pipeline/hooks.py"
    )


def _reads(module: nn.Module, name: str) -> bool:
    """Return whether a module's own forward mentions a setting; True if its source is not available."""
    forwards = [vars(cls)["forward"] for cls in type(module).__mro__ if "forward" in vars(cls)]
    try:
        return any(name in inspect.getsource(forward) for forward in forwards if forward is not None)
    except (OSError, TypeError):
        return True


def embedding_scale(model: nn.Module) -> float:
    """Return the target's factor on token embeddings before its first layer (Gemma: sqrt(H))."""
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
    """Return the target's factor on its logits, before any soft-cap (Cohere's factor, Granite's divisor)."""
    config, scale = _text_config(model), 1.0
    for name, power in LOGIT_SCALES.items():
        if getattr(config, name, None) and _reads(model, name):
            scale *= getattr(config, name) ** LOGIT_SCALE_EXCEPTIONS.get((config.model_type, name), power)
    return float(scale)


def final_logit_softcapping(model: nn.Module) -> float | None:
    """Return the tanh soft-cap on the target's logits, if it has one (Gemma 2)."""
    config = _text_config(model)
    caps = (getattr(config, name, None) for name in SOFTCAPS if _reads(model, name))
    return next((float(cap) for cap in caps if cap), None)


def _tensor_of(output: Any) -> Tensor:
    return (output[0] if isinstance(output, tuple | list) else output).detach()


def learned_positions(model: nn.Module) -> int | None:
    """Return the number of learned position embeddings (GPT-2, OPT); None if positions are not limited so."""
    token_embedding = _token_embedding(model)
    for name, child in find_decoder(model).named_children():
        positional = "pos" in name or name == "wpe"
        if positional and isinstance(child, nn.Embedding) and child is not token_embedding:
            return getattr(_text_config(model), "max_position_embeddings", None) or child.num_embeddings
    return None


def input_device(model: nn.Module) -> torch.device:
    """Return the device for token ids: the embedding's, even if the model is spread over several."""
    embedding = _token_embedding(model)
    if embedding is not None:
        return embedding.weight.device
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


@contextmanager
def tap_states(model: nn.Module, layer_ids: Sequence[int], *, last_hidden: bool = True) -> Iterator[dict]:
    """Collect layer outputs by id, and the post-norm state under `"last_hidden"`, in one forward.

    Yields a dict that a forward inside the block fills with detached tensors `[B, S, H]`. The embedding
    output is read at the input of layer 0, so that it includes scaling and position embeddings that a family
    applies outside its embedding module. Hooks are removed on exit, also after an error.
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


@contextmanager
def rows_taken_as_given() -> Iterator[None]:
    """Keep transformers from looking into the rows of a forward without an attention mask.

    It would look whether position ids restart within a row, and whether a row ends with padding, and the host
    would wait for the GPU to tell. Rows of a capture hold one sequence each, padded on the right.
    """
    for owner, name, _ in _LOOKS:
        setattr(owner, name, lambda *_, **__: None)
    try:
        yield
    finally:
        for owner, name, look in _LOOKS:
            setattr(owner, name, look)


def check_states(
    model: nn.Module, states: dict[int | str, Tensor], keys: Sequence[int | str], shape: Sequence[int]
) -> None:
    """Check what `tap_states` collected.

    Args:
        keys: the requested states.
        shape: of the input ids, `[B, S]`.

    Raises:
        TargetError: a state is missing (the model skipped that layer) or is not `[B, S, H]`.
    """
    name = type(model).__name__
    for key in keys:
        if key not in states:
            raise TargetError(f"{name} did not run layer {key}: remove it from the layer ids")
        got = tuple(states[key].shape)
        if len(got) != 3 or got[:2] != tuple(shape):
            raise TargetError(
                f"{name}: expected states [B, S, H] with B, S = {tuple(shape)}, got {got} at {key}: "
                "use another target, whose layers return hidden states"
            )
