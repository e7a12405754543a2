"""Open and load a target.

`open_target(options)` reads only the config. The tokenizer, the identity and the weights are read on use.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.cache import TargetIdentity
from pipeline.cache.manifest import is_weights
from pipeline.device import native_bf16, resolve_device, use_device
from pipeline.errors import TargetError, UsageError
from pipeline.hooks import find_final_norm, find_layers, learned_positions
from pipeline.rope import independent_rope
from pipeline.target_model.adapter import adapter_files, check_adapter, merge_adapter
from pipeline.target_model.checkpoint import (
    REPORTED,
    check_loaded,
    check_loading,
    check_stored,
    refuse_offload,
)
from pipeline.target_model.find import resolve_directory, weights_hash
from pipeline.target_model.gguf import gguf_options, need
from pipeline.target_model.identity import target_identity
from pipeline.target_model.notes import waiting
from pipeline.target_model.options import TargetOptions
from pipeline.target_model.parallel import split_arguments
from pipeline.target_model.quantisation import check_quantisation, quantisation
from pipeline.text import one_line

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Files from which a target's config and tokenizer load again, without its weights.
_LIGHT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    *("vocab*", "merges.txt", "*.model"),  # of older tokenizers
)
_PLAIN = TargetOptions()
# transformers' classes that hold a causal LM, the plain one first.
_AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")


@dataclass(frozen=True)
class Target:
    """A target with its config, made by `open_target`."""

    options: TargetOptions
    name: str
    """Directory name or Hub id; with an adapter, `base+adapter`."""
    directory: Path
    config: Any
    dtype: torch.dtype
    """The dtype that it computes in."""
    device: torch.device
    """The device that it runs on; with `--device-map`, one of them."""

    @cached_property
    def shell(self) -> nn.Module:
        """The model on the meta device: every module, no weights.

        Raises:
            TargetError: see `build_shell`.
        """
        return build_shell(self.directory, self.config, self.dtype, self.options)

    @property
    def checkpoint_dtype(self) -> torch.dtype:
        """The dtype of the stored weights."""
        if self.options.gguf_file is not None:  # quantised weights load in the dtype that it computes in
            return self.dtype
        return _config_dtype(self.config)

    def identity(self, *, hash_weights: bool = True) -> TargetIdentity:
        """Return the identity for a cache's manifest.

        Args:
            hash_weights: False leaves the weights' hash empty, because reading all of them takes seconds.

        Raises:
            TargetError: the target has no weights.
        """
        weights = weights_hash(self.directory, self.options) if hash_weights else ""
        return target_identity(self.name, weights, self.shell, self.dtype)

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.directory, self.options)

    def tokenizer(self) -> Any:
        """Return the tokenizer, read once. Raises TargetError if it is missing or has no offsets."""
        return self._tokenizer

    def check_weights(self) -> None:
        """Check the checkpoint and the adapter by their headers, without reading the target's weights.

        Raises:
            TargetError: weights are missing, of another shape, or quantised in a form that is not undone.
        """
        check_quantisation(self.directory, self.config)
        if self.options.gguf_file is None and quantisation(self.config) is None:
            check_stored(self.directory, self.config, self.shell, self.dtype)
        if self.options.adapter is not None:
            check_adapter(Path(self.options.adapter), self.shell)

    def model(self, ranks: int = 1) -> nn.Module:
        """Load the model in eval mode, frozen, on `device`, spread by `--device-map`, or split over ranks.

        Raises:
            TargetError: it can't be loaded, or a weight of it would not be the checkpoint's.
        """
        waiting(f"loading {self.name} ...")
        check_quantisation(self.directory, self.config)
        model = load_target(self.directory, self.dtype, self.device, self.options, self.config, ranks)
        quantised = quantisation(self.config) is not None
        check_loaded(self.directory, model, self.shell, self.dtype, quantised=quantised)
        if self.options.adapter is not None:
            model = merge_adapter(Path(self.options.adapter), model)
        return model

    def files(self) -> dict[str, bytes]:
        """Return config and tokenizer files by name, from which both load again without the weights."""
        if self.options.gguf_file is None:
            paths = {path for pattern in _LIGHT_FILES for path in self.directory.glob(pattern)}
            return _contents(sorted(paths))
        with tempfile.TemporaryDirectory() as folder:  # a GGUF file holds both
            self.config.save_pretrained(folder)
            self.tokenizer().save_pretrained(folder)
            return _contents(sorted(Path(folder).iterdir()))

    def check_length(self, length: int) -> None:
        """Refuse samples longer than the target's learned positions (GPT-2, OPT).

        Args:
            length: tokens of the longest sample.

        Raises:
            UsageError: it is too long; the message names the length that fits.
        """
        limit = learned_positions(self.shell)
        if limit is not None and length > limit:
            raise UsageError(
                f"a sample has {length:,} tokens, but {self.name} has only {limit:,} learned positions: "
                f"give --max-length {limit} or less"
            )


def open_target(options: TargetOptions) -> Target:
    """Find the target that `options` names and read its config.

    Raises:
        UsageError: options that exclude each other, or a device that this machine lacks.
        TargetError: the target is not found, or its config can't be read.
    """
    if options.device_map and options.device != "auto":
        raise UsageError(
            f"--device-map {options.device_map} chooses devices itself: drop --device {options.device}"
        )
    name = options.target
    if name is None:
        raise UsageError("no target: give --target a Hugging Face directory or Hub id")
    waiting(f"opening {name} ...")
    directory = resolve_directory(name, options)
    device = resolve_device(options.device)
    config = load_config(directory, options)
    if options.gguf_file and getattr(config.get_text_config(), "dtype", None) is None:
        config.get_text_config().dtype = torch.bfloat16  # quantised weights have no dtype of their own
    name = directory.resolve().name if Path(name).is_dir() else name
    if options.adapter is not None:
        adapter_files(Path(options.adapter))
        name = f"{name}+{Path(options.adapter).resolve().name}"
    return Target(
        options=options,
        name=name,
        directory=directory,
        config=config,
        dtype=resolve_dtype(options.dtype, config, device),
        device=device,
    )


def resolve_dtype(name: str, config: Any, device: torch.device) -> torch.dtype:
    """Return the dtype to compute in. `auto`: the checkpoint's own, but float32 if bf16 is emulated."""
    if name != "auto":
        return DTYPES[name]
    dtype = _config_dtype(config)
    return torch.float32 if dtype == torch.bfloat16 and not native_bf16(device) else dtype


def _config_dtype(config: Any) -> torch.dtype:
    dtype = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)
    return dtype if isinstance(dtype, torch.dtype) else DTYPES.get(str(dtype), torch.float32)


def _source(options: TargetOptions) -> dict[str, Any]:
    """Return the arguments of every `from_pretrained`."""
    source = {"local_files_only": True, "trust_remote_code": options.trust_remote_code}
    if options.gguf_file is not None:
        need("gguf", "accelerate", reason="--gguf-file")
        source["gguf_file"] = options.gguf_file
    return source


def load_config(directory: Path, options: TargetOptions = _PLAIN) -> Any:
    """Read the target's Hugging Face config. Raises TargetError if transformers can't."""
    from transformers import AutoConfig

    source = _source(options)
    try:
        return AutoConfig.from_pretrained(directory, **source)
    except Exception as error:
        place = options.gguf_file or "config.json"
        raise _refusal(directory, f"its {place} can't be read", error) from None


def load_tokenizer(directory: Path, options: TargetOptions = _PLAIN) -> Any:
    """Load the target's tokenizer. Raises TargetError if it is missing or has no offsets."""
    from transformers import AutoTokenizer

    source = _source(options)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, **source)
    except Exception as error:
        raise _refusal(directory, "its tokenizer can't be loaded", error) from None
    if not tokenizer.is_fast:
        raise TargetError(
            f"{directory}: expected a fast tokenizer, whose offsets the loss mask needs; "
            f"got {type(tokenizer).__name__}: use another target"
        )
    return tokenizer


def auto_class(directory: Path, config: Any) -> Any:
    """Return the transformers class that loads `config` as a causal LM, or as a multimodal model with one.

    Raises:
        TargetError: an encoder-decoder, or a model that predicts no next token.
    """
    import transformers

    name = (getattr(config, "architectures", None) or [config.model_type])[0]
    wanted = "pass a decoder-only causal LM"
    if getattr(config, "is_encoder_decoder", False):
        raise TargetError(f"{directory}: {name} is an encoder-decoder: {wanted}")
    for auto_name in _AUTO_CLASSES:
        auto = getattr(transformers, auto_name, None)
        remote = getattr(config, "auto_map", None) or {}
        if auto is not None and (auto_name in remote or type(config) in auto._model_mapping):
            return auto
    raise TargetError(f"{directory}: {name} (model type {config.model_type}) is not a causal LM: {wanted}")


def load_target(
    directory: Path,
    dtype: torch.dtype,
    device: torch.device,
    options: TargetOptions = _PLAIN,
    config: Any = None,
    ranks: int = 1,
) -> nn.Module:
    """Load the target for inference. Its GPU becomes the calling thread's current one.

    Args:
        config: the target's config; None reads it.
        ranks: processes that it is split over.

    Raises:
        TargetError: transformers can't load it, not every weight is the checkpoint's, or with
            `--device-map`, it does not fit the GPUs.
    """
    source = {**_source(options), **gguf_options(options.gguf_file), **split_arguments(ranks), "dtype": dtype}
    if options.attn_implementation is not None:
        source["attn_implementation"] = options.attn_implementation
    if options.device_map is not None:
        need("accelerate", reason="--device-map")
        source["device_map"] = options.device_map
    config = config or load_config(directory, options)
    auto, placed = auto_class(directory, config), options.device_map is not None or ranks > 1
    if not placed and quantisation(config) is not None:  # quantised weights may not move after loading
        source["device_map"] = {"": device}
    try:
        model, report = auto.from_pretrained(directory, **source, **REPORTED)
    except Exception as error:
        raise _refusal(directory, "the target can't be loaded", error) from None
    check_loading(directory, model, report)
    if not placed:
        use_device(device)
        model = model.to(device)
    else:
        refuse_offload(directory, model, device)
    independent_rope(model)
    return model.eval().requires_grad_(False)


def build_shell(
    directory: Path, config: Any, dtype: torch.dtype, options: TargetOptions = _PLAIN
) -> nn.Module:
    """Build the target on the meta device, which takes no memory and reads no weights.

    Raises:
        TargetError: not a causal LM, no such attention implementation, or a missing part.
    """
    auto = auto_class(directory, config)

    def build(**chosen: Any) -> nn.Module:
        with torch.device("meta"):
            return auto.from_config(
                copy.deepcopy(config),  # because from_config writes its arguments into it
                dtype=dtype,
                trust_remote_code=options.trust_remote_code,
                **chosen,
            )

    chosen = {"attn_implementation": options.attn_implementation} if options.attn_implementation else {}
    try:
        model = build(**chosen)
    except Exception as error:
        if chosen and _works(build):
            name = options.attn_implementation
            raise _refusal(
                directory, f"--attn-implementation {name} can't be used, try sdpa or eager", error
            ) from None
        raise _refusal(directory, "not a causal language model", error) from None
    find_layers(model)
    find_final_norm(model)
    _check_head(directory, model)
    return model


def _works(build: Any) -> bool:
    try:
        build()
    except Exception:
        return False
    return True


def _check_head(directory: Path, model: nn.Module) -> None:
    head, hidden = model.get_output_embeddings(), model.config.get_text_config().hidden_size
    if head is None or getattr(head, "weight", None) is None or getattr(head, "bias", None) is not None:
        raise TargetError(
            f"{directory}: expected an lm_head that is a plain matrix without a bias; "
            f"{type(model).__name__} has another: use another target"
        )
    widths = {head.weight.shape[1], model.get_input_embeddings().weight.shape[1], hidden}
    if len(widths) > 1:
        raise TargetError(
            f"{directory}: expected embedding, layers and lm_head of one width, got {sorted(widths)}: "
            f"{type(model).__name__} projects between them, use another target"
        )


def _refusal(directory: Path, what: str, error: Exception) -> TargetError:
    if "trust_remote_code" in str(error):
        return TargetError(
            f"{directory} has Python files of its own, which must run to load it: read them, then give "
            "--trust-remote-code"
        )
    return TargetError(f"{directory}: {what} ({one_line(error)})")


def _contents(paths: Sequence[Path]) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in paths if path.is_file() and not is_weights(path.name)}
