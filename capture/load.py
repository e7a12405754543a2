"""Find a target on disk or on the Hub, say what it is, and load it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline import files
from pipeline.cache import TargetIdentity, TokenizerIdentity
from pipeline.errors import TargetError
from pipeline.hooks import embedding_scale, final_logit_softcapping, find_layers

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")


def resolve_directory(target: str) -> Path:
    """The directory that holds a target: a local path, or a Hub id's snapshot.

    Raises:
        TargetError: neither a directory with a config.json nor a Hub model that can be fetched.
    """
    path = Path(target)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise TargetError(f"{path} has no config.json: expected a Hugging Face model directory")
        return path
    if path.is_absolute() or target.startswith((".", "~")) or target.count("/") > 1:
        raise TargetError(f"no such target directory: {target}")
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]
        return Path(snapshot_download(target, allow_patterns=patterns))
    except Exception as error:  # offline, no such repository, gated: the hub's own tree of errors
        reason = " ".join(str(error).split())[:200]
        raise TargetError(
            f"no such target: {target} is neither a directory nor a Hub model that can be fetched ({reason})"
        ) from None


def _native_bf16(device: torch.device) -> bool:
    """Whether `device` multiplies bf16 matrices in hardware; emulated, they are far slower than fp32."""
    if device.type != "cpu":
        return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))


def resolve_dtype(name: str, config: Any, device: torch.device) -> torch.dtype:
    """What the target computes in. `auto` is the checkpoint's own dtype where the device is fast at it."""
    if name != "auto":
        return DTYPES[name]
    dtype = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)
    dtype = dtype if isinstance(dtype, torch.dtype) else DTYPES.get(str(dtype), torch.float32)
    return torch.float32 if dtype == torch.bfloat16 and not _native_bf16(device) else dtype


def weights_hash(directory: Path) -> str:
    """SHA-256 over the names and contents of a target's weight files.

    Raises:
        TargetError: the directory holds no weights.
    """
    weights = sorted({path for pattern in _WEIGHTS for path in directory.glob(pattern)})
    if not weights:
        raise TargetError(f"{directory} holds no weights: expected *.safetensors beside its config.json")
    digest = hashlib.sha256()
    for path in weights:
        digest.update(f"{path.name}:{files.sha256_file(path)}\n".encode())
    return digest.hexdigest()


def load_config(directory: Path) -> Any:
    """The target's Hugging Face config. Raises TargetError when transformers can't read it."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True)
    except Exception as error:
        raise TargetError(f"{directory}: its config.json can't be read ({_first_line(error)})") from None


def load_tokenizer(directory: Path) -> Any:
    """The target's tokenizer. Raises TargetError when it is missing or has no offsets."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:
        raise TargetError(f"{directory}: its tokenizer can't be loaded ({_first_line(error)})") from None
    if not tokenizer.is_fast:
        raise TargetError(f"{directory}: its tokenizer has no fast version, which the loss mask needs")
    return tokenizer


def load_target(directory: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Load the target for inference. Raises TargetError when transformers can't."""
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True)
    except Exception as error:
        raise TargetError(f"{directory}: the target can't be loaded ({_first_line(error)})") from None
    return model.to(device).eval().requires_grad_(False)


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def target_shape(name: str, directory: Path, config: Any, dtype: torch.dtype) -> TargetIdentity:
    """Say what a target is without loading its weights: the model is built on the meta device."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:
        raise TargetError(f"{directory}: not a causal language model ({_first_line(error)})") from None
    head = model.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        raise TargetError(f"{directory}: expected a target whose lm_head is a plain matrix, without a bias")
    embeddings = model.get_input_embeddings()
    return TargetIdentity(
        name=directory.resolve().name if Path(name).is_dir() else name,
        weights=weights_hash(directory),
        architecture=type(model).__name__,
        model_type=config.get_text_config().model_type,
        hidden_size=embeddings.weight.shape[1],
        num_layers=len(find_layers(model)),
        vocab_size=embeddings.weight.shape[0],
        dtype=str(dtype).removeprefix("torch."),
        tied_embeddings=head.weight is embeddings.weight,
        embedding_scale=embedding_scale(model),
        final_logit_softcapping=final_logit_softcapping(model),
    )


def tokenizer_identity(tokenizer: Any) -> TokenizerIdentity:
    """Hash what decides the tokens: vocabulary and merges, and the chat template."""
    content = tokenizer.backend_tokenizer.to_str().encode()
    template = tokenizer.chat_template or ""
    return TokenizerIdentity(
        sha256=hashlib.sha256(content).hexdigest(),
        chat_template_sha256=hashlib.sha256(str(template).encode()).hexdigest(),
        length=len(tokenizer),
        mask_token_id=tokenizer.mask_token_id,
        unk_token_id=tokenizer.unk_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
