"""The options that `capture`, `preview` and `regenerate` share: which target, and which conversations."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click

from pipeline.errors import UsageError

Command = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class TargetOptions:
    """Which target, and how to load it."""

    target: str | None = None
    """Hugging Face directory or Hub id; None is the example's."""
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


def _gathered(cls: type, name: str, options: list[Callable]) -> Callable[[Command], Command]:
    """A decorator that adds click options and hands them to the command as one `cls`, under `name`."""

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def gather(*args: Any, **kwargs: Any) -> Any:
            values = {field.name: kwargs.pop(field.name) for field in fields(cls)}
            return command(*args, **{name: cls(**values)}, **kwargs)

        for option in reversed(options):
            gather = option(gather)
        return gather

    return decorate


target_options = _gathered(
    TargetOptions,
    "target",
    [
        click.option("--target", help="Hugging Face directory or Hub id. Default: the example's target."),
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
    ],
)
"""Adds the options of `TargetOptions` to a click command, which receives them as `target`."""


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """Which conversations, and how they become samples."""

    data: tuple[str, ...] = ()
    """Files, folders and Hub ids; none is the example's."""
    split: str | None = None
    subset: str | None = None
    format: str = "auto"
    chat_template: str | None = None
    template_arg: tuple[str, ...] = ()
    supervise: str = "all"
    mask_reasoning: bool = False
    max_length: int = 4096
    too_long: str = "cut"
    min_supervised: int = 0
    num_samples: int | None = None
    shuffle: bool = False
    seed: int = 0
    bad_rows: str = "fail"
    tokenize_workers: int | None = None

    def settings(self) -> dict[str, str]:
        """What the manifest says of them: every option that was given a value, as text."""
        left_out = ("data", "tokenize_workers")
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}
        if not self.shuffle:
            del values["seed"]
        if self.chat_template:  # the identity holds the template's hash; a path means nothing elsewhere
            values["chat_template"] = Path(self.chat_template).name
        return {
            name: " ".join(value) if isinstance(value, tuple) else str(value).lower()
            for name, value in values.items()
            if value not in (None, (), False)
        }

    def template_arguments(self) -> dict[str, Any]:
        """`--template-arg name=value`, the values as JSON where they are (true, 3), else as text.

        Raises:
            UsageError: one without a name or an equals sign.
        """
        arguments = {}
        for argument in self.template_arg:
            name, sign, value = argument.partition("=")
            if not sign or not name.isidentifier():
                raise UsageError(f"expected --template-arg name=value, got {argument!r}")
            if name in ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message"):
                raise UsageError(f"--template-arg {name} is set for every conversation: leave it out")
            try:
                arguments[name] = json.loads(value)
            except ValueError:
                arguments[name] = value
        return arguments


_FORMS = ["auto", "messages", "conversations", "prompt", "tokens", "text"]

data_options = _gathered(
    DataOptions,
    "data",
    [
        click.option(
            "--data",
            multiple=True,
            help="JSONL, JSON, Parquet or Arrow file, a folder of them, a folder saved by datasets, or a Hub "
            "dataset id. May be given several times. Default: the example's conversations.",
        ),
        click.option("--split", help="Split of a Hub dataset or a saved one.  [default: train]"),
        click.option("--subset", help="Subset (configuration) of a Hub dataset."),
        click.option(
            "--format",
            type=click.Choice(_FORMS),
            default="auto",
            show_default=True,
            help="What rows hold. auto: told by each row's keys.",
        ),
        click.option("--chat-template", help="Jinja file to use instead of the tokenizer's own template."),
        click.option(
            "--template-arg",
            multiple=True,
            metavar="NAME=VALUE",
            help="Extra template variable, such as enable_thinking=false. May be given several times.",
        ),
        click.option(
            "--supervise",
            type=click.Choice(["all", "last"]),
            default="all",
            show_default=True,
            help="Learn from every assistant turn, or from the last one only.",
        ),
        click.option("--mask-reasoning", is_flag=True, help="Leave <think>...</think> out of the loss."),
        click.option(
            "--max-length",
            type=click.IntRange(min=2),
            default=4096,
            show_default=True,
            help="Tokens of a sample at most.",
        ),
        click.option(
            "--too-long",
            type=click.Choice(["cut", "drop"]),
            default="cut",
            show_default=True,
            help="What becomes of longer ones.",
        ),
        click.option(
            "--min-supervised",
            type=click.IntRange(min=0),
            default=0,
            show_default=True,
            help="Supervised tokens that a sample must have.",
        ),
        click.option("--num-samples", type=click.IntRange(min=1), help="Take that many samples at most."),
        click.option("--shuffle", is_flag=True, help="Shuffle the samples, before --num-samples are taken."),
        click.option("--seed", default=0, show_default=True, help="Of --shuffle."),
        click.option(
            "--bad-rows",
            type=click.Choice(["fail", "skip"]),
            default="fail",
            show_default=True,
            help="Stop at a row that can't be used, or leave it out and count it.",
        ),
        click.option(
            "--tokenize-workers",
            type=click.IntRange(min=1),
            help="Tokenising processes.  [default: one a core]",
        ),
    ],
)
"""Adds the options of `DataOptions` to a click command, which receives them as `data`."""
