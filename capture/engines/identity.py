"""The engine as a cache's identity names it, and targets that it can't run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from capture.engines.options import HUGGING_FACE, EngineOptions
from pipeline.cache import EngineIdentity
from pipeline.errors import TargetError, UsageError
from pipeline.rope import RopeLengths
from pipeline.target_model.load import Target
from pipeline.target_model.parallel import check_split
from pipeline.target_model.quantisation import quantisation
from pipeline.text import one_line

# Prints the version of the package that holds the module, under whichever name it is installed.
_VERSION = (
    "from importlib.metadata import packages_distributions as packages, version\n"
    "print(version(packages()['vllm'][0]))"
)
# Arguments that fit vLLM to a machine. A cache goes on with others, such as after memory ran out.
_OF_THE_MACHINE = (
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "max_num_seqs",
    "max_num_batched_tokens",
    "cpu_offload_gb",
    "swap_space",
    "download_dir",
)
# Options of --target that only transformers understands.
_HUGGING_FACES = {
    "gguf_file": "save the target as safetensors first",
    "adapter": "merge it into the target and pass the result",
    "device_map": "--tensor-parallel splits the target",
    "attn_implementation": "--engine-arg attention_config=... chooses vLLM's",
}


def engine_identity(options: EngineOptions, target: Target) -> EngineIdentity | None:
    """Return the engine's identity; None for transformers in one process.

    Raises:
        TargetError: the engine's environment has no vLLM.
    """
    if options.is_plain:
        return None
    given = {name: value for name, value in options.arguments().items() if name not in _OF_THE_MACHINE}
    arguments = {name: json.dumps(value, sort_keys=True) for name, value in given.items()}
    return EngineIdentity(
        name=options.engine,
        version="" if options.engine == HUGGING_FACE else vllm_version(engine_python(options)),
        tensor_parallel=options.tensor_parallel,
        quantization=_quantization(options, target),
        arguments=arguments,
    )


def engine_python(options: EngineOptions) -> Path:
    """Return the Python that runs vLLM."""
    return options.engine_python or Path(sys.executable)


def vllm_version(python: Path) -> str:
    """Return the version of vLLM in an environment. Raises TargetError if there is none."""
    try:
        found = subprocess.run([python, "-c", _VERSION], capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise TargetError(f"--engine-python {python} can't be run: {one_line(error)}") from None
    if found.returncode != 0:
        raise TargetError(
            f"{python} has no vLLM: install vllm there, or name the Python of an environment that has it "
            "with --engine-python"
        )
    return found.stdout.strip()


def _quantization(options: EngineOptions, target: Target) -> str:
    """Return the form of the quantised weights, by the engine's argument or the checkpoint's config."""
    asked: Any = options.arguments().get("quantization")
    found = quantisation(target.config)
    return str(asked or (found or {}).get("quant_method") or "")


def check_engine(options: EngineOptions, target: Target, rope: RopeLengths) -> None:
    """Refuse a target that the engine can't run faithfully.

    Raises:
        UsageError: naming the option, and what to do instead.
    """
    if options.engine == HUGGING_FACE:
        if options.is_split:
            check_split(target, options.tensor_parallel)
        return
    for name, remedy in _HUGGING_FACES.items():
        if getattr(target.options, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} is an option of --engine huggingface, not of vllm: {remedy}")
    if rope.ropes and "max_model_len" not in options.arguments():
        raise UsageError(
            f"{target.name} has other rotary embeddings for longer contexts, and vLLM chooses them by its "
            "max_model_len: give --engine-arg max_model_len=N, the length that you serve with"
        )
