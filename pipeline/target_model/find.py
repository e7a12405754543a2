"""Find a target's directory on disk or on the Hub, and hash the files that decide its states."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline import files
from pipeline.errors import TargetError, UsageError
from pipeline.target_model.adapter import ADAPTER_CONFIG, adapter_files
from pipeline.target_model.options import TargetOptions
from pipeline.text import one_line

_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
# Files to download from a Hub repository, besides weights.
_HUB_FILES = ("*.json", "*.model", "*.jinja", "*.txt")
# Copies of the weights in another format.
_HUB_SKIPPED = ("consolidated*", "original/*")
_PLAIN = TargetOptions()
# Weight files hashed at a time: a thread hashes about 1.5 GB/s, and disks read faster.
HASHING_THREADS = 8


def resolve_directory(target: str, options: TargetOptions = _PLAIN) -> Path:
    """Return a target's directory: a local path, or the snapshot of a Hub id.

    Raises:
        UsageError: `--revision` with a local directory.
        TargetError: neither a directory with a config.json (or the GGUF file) nor a Hub model that can be
            downloaded.
    """
    path = Path(target)
    if path.is_dir():
        if options.revision is not None:
            raise UsageError(
                f"--revision {options.revision} names a commit of a Hub id, but {target} is a local "
                "directory: drop --revision, or give the Hub id"
            )
        return _checked(path, options.gguf_file)
    if path.is_file():
        hint = f", and --gguf-file {path.name}" if path.suffix == ".gguf" else ""
        raise TargetError(
            f"expected a directory or Hub id, {target} is a file: give --target {path.parent}{hint}"
        )
    if path.is_absolute() or target.startswith((".", "~")) or target.count("/") > 1:
        raise TargetError(f"no such target directory: {target}; give --target a directory or Hub id")
    from huggingface_hub import snapshot_download

    weights = options.gguf_file or "*.safetensors"
    patterns = [*_HUB_FILES, weights, *(["*.py"] if options.trust_remote_code else [])]
    try:
        directory = Path(
            snapshot_download(
                target,
                revision=options.revision,
                allow_patterns=patterns,
                ignore_patterns=list(_HUB_SKIPPED),
            )
        )
    except Exception as error:  # offline, no such repository, gated: errors of many types
        at = f" at revision {options.revision}" if options.revision else ""
        raise TargetError(
            f"no such target: {target} is neither a directory nor a Hub model that can be downloaded{at} "
            f"({one_line(error)})"
        ) from None
    return _checked(directory, options.gguf_file)


def _checked(directory: Path, gguf_file: str | None) -> Path:
    """Return `directory` if it has the file that config and tokenizer are read from. Raises TargetError."""
    ggufs = sorted(path.name for path in directory.glob("*.gguf"))
    has_config, is_adapter = ((directory / name).is_file() for name in ("config.json", ADAPTER_CONFIG))
    if is_adapter and not has_config:
        raise TargetError(
            f"{directory} is an adapter, not a whole model: give its base with --target and this directory "
            "with --adapter"
        )
    if is_adapter:
        raise TargetError(
            f"{directory} has {ADAPTER_CONFIG} beside config.json, and transformers would apply it or not by "
            "whether peft is installed: move the adapter to a directory of its own and give it with "
            "--adapter, or remove it if it is merged"
        )
    if gguf_file is not None:
        if not (directory / gguf_file).is_file():
            found = ", ".join(ggufs) or "none"
            raise TargetError(f"no file {gguf_file} in {directory}: it has these GGUF files: {found}")
    elif not has_config:
        remedy = f"; for a GGUF file, give --gguf-file {ggufs[0]}" if ggufs else ""
        raise TargetError(f"{directory} has no config.json: expected a Hugging Face model directory{remedy}")
    return directory


def weights_hash(directory: Path, options: TargetOptions = _PLAIN) -> str:
    """Compute the SHA-256 over names and contents of a target's weights, and of its code if it is trusted.

    With an adapter, its files are hashed too.

    Raises:
        TargetError: the directory has no weights, or the adapter's is no adapter.
    """
    patterns = (options.gguf_file,) if options.gguf_file else _WEIGHTS
    weights = sorted({path for pattern in patterns for path in directory.glob(pattern)})
    if not weights:
        raise TargetError(f"{directory} has no weights: expected *.safetensors beside its config.json")
    code = sorted(directory.glob("*.py")) if options.trust_remote_code else []
    adapter = adapter_files(Path(options.adapter)) if options.adapter is not None else []
    paths = weights + code + adapter
    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        hashes = threads.map(files.sha256_file, paths)
        lines = [f"{path.name}:{digest}\n" for path, digest in zip(paths, hashes, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
