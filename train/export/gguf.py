"""Write a draft as a GGUF file for llama.cpp: `dspark export --to llama.cpp --gguf`.

Keys, tensors and their order are those of llama.cpp's own converter. The tokenizer is copied from the
target's GGUF file, because both have to have the same.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import UsageError
from train.draft.serving import GgufLayout
from train.draft.vocabulary import kept_tokens

# Types of a file's matrices, and numbers for them in `general.file_type`.
FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}
_TOKENS = "tokenizer.ggml.tokens"
_MASK_TOKEN = "tokenizer.ggml.mask_token_id"


def check_gguf_package() -> None:
    """Check that the package which writes GGUF files is there. Raise UsageError if not."""
    if importlib.util.find_spec("gguf") is None:
        raise UsageError("--gguf needs the package gguf: pip install 'dspark-pipeline[gguf]'")


def read_tokenizer(path: Path, *, vocab_size: int, hidden_size: int) -> dict[str, tuple[Any, ...]]:
    """Read the tokenizer of a target's GGUF file.

    Args:
        path: the file.
        vocab_size: V, rows of the target's embedding.
        hidden_size: H of the target.

    Returns:
        Value, type and type of a list's items of each key of the tokenizer.

    Raises:
        UsageError: it is no GGUF file, or one of another target.
    """
    from gguf import GGUFReader, GGUFValueType

    try:
        fields = GGUFReader(path).fields
        model = fields["general.architecture"].contents()
        width = fields[f"{model}.embedding_length"].contents()
        tokens = len(fields[_TOKENS].data)
        found = {
            name: (field.contents(), field.types[0], field.types[-1])
            for name, field in fields.items()
            if name.startswith("tokenizer.") and name != _MASK_TOKEN
        }
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise UsageError(
            f"--target-gguf {path} can't be read as a GGUF file with a tokenizer ({error}): pass the file "
            "of the target that llama-server is started with"
        ) from None
    if (width, tokens) != (hidden_size, vocab_size):
        raise UsageError(
            f"--target-gguf {path} is of another target: width {width:,} and {tokens:,} tokens there, "
            f"{hidden_size:,} and {vocab_size:,} in the draft's: pass the GGUF file of the draft's target"
        )
    return {
        name: (value, kind, of if kind == GGUFValueType.ARRAY else None)
        for name, (value, kind, of) in found.items()
    }


def write_gguf(
    path: Path,
    layout: GgufLayout,
    values: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    tokenizer: Mapping[str, tuple[Any, ...]],
    file_type: str,
    name: Path,
) -> None:
    """Write a draft's GGUF file.

    Args:
        path: file to write, in the folder of the export, which has config.json and the model card already.
        layout: of the draft's kind.
        values: the exported config.
        weights: the draft's, and of the target what comes along.
        tokenizer: as `read_tokenizer` returns it.
        file_type: a key of `FILE_TYPES`.
        name: path of the export, by which the file calls the draft.
    """
    import gguf

    writer = gguf.GGUFWriter(None, layout.architecture)
    for tensor_name, array, wanted in _tensors(layout, values, weights, file_type):
        kind = gguf.GGMLQuantizationType[wanted.upper()]
        try:
            data = gguf.quants.quantize(array, kind) if array.dtype != np.int64 else array
        except gguf.QuantError:  # rows that don't divide into blocks of the type
            kind = gguf.GGMLQuantizationType.F16
            data = gguf.quants.quantize(array, kind)
        writer.add_tensor(tensor_name, data, raw_dtype=kind)
    _add(writer, _prefixed(layout, layout.first(values)))
    _add_names(writer, path.parent, name)
    shared, last = _prefixed(layout, _shared_keys(values)), _prefixed(layout, layout.last(values))
    _add(writer, {**shared, "general.file_type": FILE_TYPES[file_type], **last})
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, entry in tokenizer.items():
        writer.add_key_value(key, *entry)
    mask_token = layout.mask_token(values)
    if mask_token is not None:
        writer.add_mask_token_id(mask_token)
    writer.write_header_to_file(path=path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_names(writer: Any, folder: Path, name: Path) -> None:
    """Add what the package reads about a model from its card and its folder's name."""
    import gguf

    size, shared, expert, experts = writer.get_total_parameter_count()
    card, config = gguf.Metadata.load_model_card(folder), gguf.Metadata.load_hf_parameters(folder)
    about = gguf.Metadata.apply_metadata_heuristic(gguf.Metadata(), card, config, name, size)
    about.name = about.name or name.name
    about.size_label = about.size_label or gguf.size_label(size, shared, expert, experts)
    writer.add_type(gguf.GGUFType.MODEL)
    about.set_gguf_meta_model(writer)


def _shared_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys that all kinds have, in the converter's order."""
    rope = values["rope_parameters"]
    keys: dict[str, Any] = {
        "block_count": values["num_hidden_layers"],
        "context_length": values["max_position_embeddings"],
        "embedding_length": values["hidden_size"],
        "feed_forward_length": values["intermediate_size"],
        "attention.head_count": values["num_attention_heads"],
        "attention.head_count_kv": values["num_key_value_heads"],
    }
    if values.get("is_causal") is False:
        keys["attention.causal"] = False
    if rope["rope_type"] in ("linear", "yarn"):
        keys["rope.scaling.type"] = rope["rope_type"]
        keys["rope.scaling.factor"] = float(rope["factor"])
    if rope["rope_type"] == "yarn":
        keys["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
        for name in ("beta_fast", "beta_slow"):
            if name in rope:
                keys[f"rope.scaling.yarn_{name}"] = float(rope[name])
    if "mrope_section" in rope:
        keys["rope.dimension_sections"] = [*rope["mrope_section"], 0, 0, 0, 0][:4]
    return {
        **keys,
        "rope.freq_base": float(rope["rope_theta"]),
        "attention.layer_norm_rms_epsilon": values["rms_norm_eps"],
        "attention.key_length": values["head_dim"],
        "attention.value_length": values["head_dim"],
    }


def _prefixed(layout: GgufLayout, keys: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{layout.architecture}.{key}": value for key, value in keys.items()}


def _add(writer: Any, keys: Mapping[str, Any]) -> None:
    """Add keys by the types of their values."""
    adders = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in keys.items():
        adders[type(value)](key, value)


def _tensors(
    layout: GgufLayout, values: Mapping[str, Any], weights: Mapping[str, Tensor], file_type: str
) -> Iterator[tuple[str, np.ndarray, str]]:
    """Yield names, values and types of tensors, in the converter's order."""
    if values["rope_parameters"]["rope_type"] == "llama3":
        yield "rope_freqs.weight", _llama3_divisors(values).numpy(), "f32"
    for name in sorted(weights.keys() - {"d2t", "t2d"}):
        weight = weights[name].float()
        if layout.neighbours and name.endswith(("q_proj.weight", "k_proj.weight")):
            halves = weight.unflatten(0, (-1, 2, values["head_dim"] // 2))
            weight = halves.transpose(1, 2).flatten(0, 2).contiguous()
        file_name = _file_name(layout, name)
        vector = weight.dim() < 2 or file_name.endswith("_norm.weight")
        yield file_name, weight.numpy(), "f32" if vector else file_type
    if "d2t" in weights:
        yield "d2t", kept_tokens(weights["d2t"]).numpy(), "i64"


def _file_name(layout: GgufLayout, name: str) -> str:
    """Return the name in the file of a weight."""
    name, _, suffix = name.rpartition(".")
    if layout.only_layer and name.startswith(layout.only_layer):
        name = "layers.0." + name.removeprefix(layout.only_layer)
    layer = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    within = layer[2] if layer else name
    place = f"blk.{layer[1]}." if layer else ""
    return f"{place}{layout.tensors[within]}.{suffix}"


def _llama3_divisors(values: Mapping[str, Any]) -> Tensor:
    """Return what Llama 3's scaling divides each rotary frequency by, `[D / 2]`.

    Frequencies of long waves are divided by the factor, those of short ones are kept, and between the two
    the kept share rises linearly with the number of waves in the original context.
    """
    rope, dim = values["rope_parameters"], values["head_dim"]
    frequencies = 1.0 / (rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    low, high = rope.get("low_freq_factor", 1.0), rope.get("high_freq_factor", 4.0)
    context, factor = rope["original_max_position_embeddings"], rope["factor"]
    waves = context / (2 * torch.pi / frequencies)
    share = (waves - low) / (high - low)
    between = 1 / ((1 - share) / factor + share)
    divisors = torch.where(waves < low, torch.full_like(waves, factor), between)
    return torch.where(waves > high, torch.ones_like(waves), divisors)
