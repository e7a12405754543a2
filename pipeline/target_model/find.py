"""Find a target's directory on disk or on the Hub, and hash what decides its states."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline import files
from pipeline.errors import TargetError, UsageError
from pipeline.target_model.options import TargetOptions
from pipeline.text import one_line

_WEIGHTS = ("*.safetensors", "*.bin", "*.gguf")
# Besides weights: what a Hub repository is asked for.
_HUB_FILES = ("*.json", "*.model", "*.jinja", "*.txt")
# Second copies of the weights, in another format.
_HUB_SKIPPED = ("consolidated*", "original/*")
_PLAIN = TargetOptions()
# Weight files hashed at a time: one thread does about 1.5 GB/s, disks more.
HASHING_THREADS = 8


def resolve_directory(target: str, options: TargetOptions = _PLAIN) -> Path:
    """The directory that holds a target: a local path, or a Hub id's snapshot.

    Raises:
        UsageError: `--revision` with a local directory.
        TargetError: neither a directory with a config.json (or the GGUF file) nor a Hub model that can
            be fetched.
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
            f"{target} is a file: expected a directory or Hub id, give --target {path.parent}{hint}"
        )
    if path.is_absolute() or target.startswith((".", "~")) or target.count("/") > 1:
        raise TargetError(f"no such target directory: {target}")
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
    except Exception as error:  # offline, no such repository, gated: the hub's own tree of errors
        at = f" at revision {options.revision}" if options.revision else ""
        raise TargetError(
            f"no such target: {target} is neither a directory nor a Hub model that can be fetched{at} "
            f"({one_line(error)})"
        ) from None
    return _checked(directory, options.gguf_file)


def _checked(directory: Path, gguf_file: str | None) -> Path:
    """`directory`, when it holds what config and tokenizer are read from."""
    ggufs = sorted(path.name for path in directory.glob("*.gguf"))
    if gguf_file is not None:
        if not (directory / gguf_file).is_file():
            found = ", ".join(ggufs) or "none"
            raise TargetError(f"no file {gguf_file} in {directory}: it holds these GGUF files: {found}")
    elif not (directory / "config.json").is_file():
        remedy = f"; for a GGUF file, give --gguf-file {ggufs[0]}" if ggufs else ""
        raise TargetError(f"{directory} has no config.json: expected a Hugging Face model directory{remedy}")
    return directory


def weights_hash(directory: Path, options: TargetOptions = _PLAIN) -> str:
    """SHA-256 over the names and contents of what decides a target's states: weights, and trusted code.

    Raises:
        TargetError: the directory holds no weights.
    """
    patterns = (options.gguf_file,) if options.gguf_file else _WEIGHTS
    weights = sorted({path for pattern in patterns for path in directory.glob(pattern)})
    if not weights:
        raise TargetError(f"{directory} holds no weights: expected *.safetensors beside its config.json")
    code = sorted(directory.glob("*.py")) if options.trust_remote_code else []
    paths = weights + code
    with ThreadPoolExecutor(HASHING_THREADS) as threads:
        hashes = threads.map(files.sha256_file, paths)
        lines = [f"{path.name}:{digest}\n" for path, digest in zip(paths, hashes, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
