"""Find the parts of any decoder-only Hugging Face model, and tap their outputs.

A new target family usually needs nothing here. One that names its parts differently gets a row in
the tables below.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import TargetError
from pipeline.features import EMBEDDING_LAYER_ID

# Where the decoder stack sits, tried in order; "" is the model itself.
DECODER_PATHS = (
    "model.language_model.model",  # multimodal wrapper around a causal LM
    "model.language_model",  # multimodal (Gemma 3 and 4, Qwen-VL)
    "language_model.model",  # older multimodal layout
    "language_model",
    "model.decoder",  # OPT
    "model",  # Llama, Mistral, Qwen, Gemma, Phi, DeepSeek, GLM and most others
    "transformer",  # GPT-2, Falcon, Bloom, GPT-J
    "gpt_neox",  # GPT-NeoX, Pythia
    "backbone",  # Mamba-style hybrids
    "",  # a bare decoder without a head
)
LAYER_NAMES = ("layers", "h", "blocks")
NORM_NAMES = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "norm_f")


def _descend(model: nn.Module, path: str) -> Any:
    for name in path.split(".") if path else ():
        model = getattr(model, name, None)
        if model is None:
            return None
    return model


def _layers_of(module: Any) -> list[nn.Module] | None:
    for name in LAYER_NAMES:
        layers = getattr(module, name, None)
        if isinstance(layers, nn.ModuleDict) and len(
            layers
        ):  # pipeline-split models key their layers by number
            return [layers[key] for key in sorted(layers, key=int)]
        if isinstance(layers, nn.ModuleList) and len(layers):
            return list(layers)
    return None


def find_decoder(model: nn.Module) -> nn.Module:
    """Return the module that owns the decoder layers and the final norm.

    Raises:
        TargetError: for encoder-decoders and models whose parts are not found, by class name.
    """
    name = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise TargetError(f"{name} is an encoder-decoder: expected a decoder-only causal LM as the target")
    for path in DECODER_PATHS:
        inner = _descend(model, path)
        if isinstance(inner, nn.Module) and _layers_of(inner) is not None:
            return inner
    raise TargetError(
        f"no decoder layers found in {name}: expected one of {', '.join(LAYER_NAMES)} under "
        f"{', '.join(p or 'the model itself' for p in DECODER_PATHS)}; add its path to pipeline/hooks.py"
    )


def find_layers(model: nn.Module) -> list[nn.Module]:
    """Return the decoder layers, in order. Raises TargetError as `find_decoder` does."""
    layers = _layers_of(find_decoder(model))
    assert layers is not None
    return layers


def find_final_norm(model: nn.Module) -> nn.Module:
    """Return the norm whose output feeds `lm_head`. Raises TargetError where there is none."""
    decoder = find_decoder(model)
    for name in NORM_NAMES:
        norm = getattr(decoder, name, None)
        if isinstance(norm, nn.Module):
            return norm
    raise TargetError(
        f"no final norm found in {type(decoder).__name__}: expected one of {', '.join(NORM_NAMES)}; "
        "add its name to pipeline/hooks.py"
    )


def embedding_scale(model: nn.Module) -> float:
    """What the target multiplies token embeddings by before its first layer (Gemma: sqrt(H))."""
    embeddings = model.get_input_embeddings()
    config = model.config.get_text_config()
    scale = getattr(embeddings, "scalar_embed_scale", None)  # Gemma 3 scales inside the embedding module
    if scale is None and config.model_type in ("gemma", "gemma2"):  # these scale in their forward
        scale = config.hidden_size**0.5
    if scale is not None:  # Gemma rounds the factor to the dtype it computes in
        return float(torch.tensor(scale, dtype=embeddings.weight.dtype))
    return float(getattr(config, "embedding_multiplier", None) or 1.0)  # Granite


def final_logit_softcapping(model: nn.Module) -> float | None:
    """The tanh soft-cap on the target's logits, if it has one (Gemma 2)."""
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return float(cap) if cap else None


def _tensor_of(output: Any) -> Tensor:
    return (output[0] if isinstance(output, tuple | list) else output).detach()


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
