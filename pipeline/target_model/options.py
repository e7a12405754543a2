"""The options of every command that needs the target: which one, and how it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click

from pipeline.options import Command, gathered


@dataclass(frozen=True, kw_only=True)
class TargetOptions:
    """Which target, and how to load it."""

    target: str | None = None
    """Hugging Face directory or Hub id; None is for the command to fill in."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id."""
    trust_remote_code: bool = False
    """Whether the model's own Python files may run."""
    attn_implementation: str | None = None
    """As in transformers: sdpa, eager, flash_attention_2, ...; None lets it choose."""
    dtype: str = "auto"
    """What the target computes in; `auto` is the checkpoint's own, or float32 where bf16 is emulated."""
    gguf_file: str | None = None
    """The GGUF file inside the directory or repository that holds the weights and the tokenizer."""
    device: str = "auto"
    device_map: str | None = None
    """`auto` spreads a target over all GPUs (needs accelerate); None keeps it on `device`."""


_HOW = [
    click.option("--revision", help="Branch, tag or commit of a Hub id."),
    click.option(
        "--trust-remote-code", is_flag=True, help="Let the model's own Python files run. Off by default."
    ),
    click.option("--attn-implementation", help="As in transformers: sdpa, eager, flash_attention_2, ..."),
    click.option(
        "--dtype",
        type=click.Choice(["auto", "bfloat16", "float16", "float32"]),
        default="auto",
        show_default=True,
        help="What the target computes in. auto: the checkpoint's own; float32 where bf16 is emulated.",
    ),
    click.option("--gguf-file", help="The GGUF file inside --target that holds weights and tokenizer."),
    click.option("--device", default="auto", show_default=True, help="cuda, cuda:1, cpu, ..."),
    click.option(
        "--device-map",
        type=click.Choice(["auto"]),
        help="Spread a target that no single GPU holds over all of them (needs accelerate).",
    ),
]


def target_options(**target: Any) -> Callable[[Command], Command]:
    """A decorator that adds the options of `TargetOptions` to a click command, as its argument `target`.

    Args:
        target: what `click.option` is told of `--target` itself: its help, whether it is required.
    """
    return gathered(TargetOptions, "target", [click.option("--target", **target), *_HOW])
