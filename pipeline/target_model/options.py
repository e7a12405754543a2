"""Options of the commands that need the target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click

from pipeline.options import Command, gathered


@dataclass(frozen=True, kw_only=True)
class TargetOptions:
    """The target and how to load it."""

    target: str | None = None
    """Hugging Face directory or Hub id; None for the command's default."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id."""
    trust_remote_code: bool = False
    """True lets the model's own Python files run."""
    attn_implementation: str | None = None
    """As in transformers: sdpa, eager, flash_attention_2, ...; None for its default."""
    adapter: str | None = None
    """Directory of a LoRA adapter that is merged into the target in memory; None for none."""
    dtype: str = "auto"
    """Dtype that the target computes in; `auto`: the checkpoint's own, but float32 if bf16 is emulated."""
    gguf_file: str | None = None
    """Name of the GGUF file in the directory or repository with the weights and the tokenizer."""
    device: str = "auto"
    device_map: str | None = None
    """`auto` spreads a target over all GPUs (needs accelerate); None keeps it on `device`."""


_OPTIONS = [
    click.option("--revision", help="Branch, tag or commit of a Hub id."),
    click.option(
        "--trust-remote-code", is_flag=True, help="Let the model's own Python files run. Off by default."
    ),
    click.option(
        "--adapter", help="Directory of a LoRA adapter, merged into the target in memory (needs peft)."
    ),
    click.option("--attn-implementation", help="As in transformers: sdpa, eager, flash_attention_2, ..."),
    click.option(
        "--dtype",
        type=click.Choice(["auto", "bfloat16", "float16", "float32"]),
        default="auto",
        show_default=True,
        help="Dtype of the target's forward. auto: the checkpoint's own, but float32 if bf16 is emulated.",
    ),
    click.option("--gguf-file", help="Name of the GGUF file in --target with weights and tokenizer."),
    click.option("--device", default="auto", show_default=True, help="cuda, cuda:1, cpu, ..."),
    click.option(
        "--device-map",
        type=click.Choice(["auto"]),
        help="Spread a target that no single GPU holds over all of them (needs accelerate).",
    ),
]


def target_options(**target: Any) -> Callable[[Command], Command]:
    """Return a decorator that adds the options of `TargetOptions` to a click command, as argument `target`.

    Args:
        target: arguments of `click.option` for `--target` itself, such as `help` and `required`.
    """
    return gathered(TargetOptions, "target", [click.option("--target", **target), *_OPTIONS])
