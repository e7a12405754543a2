"""The options that `capture`, `preview` and `regenerate` share: which target, and which conversations."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import click

from pipeline.errors import UsageError
from pipeline.options import gathered
from pipeline.target_model.options import target_options

target_or_example_options = target_options(
    help="Hugging Face directory or Hub id. Default: the example's target."
)
"""Adds the options of `TargetOptions`; without `--target`, `capture.example.with_example` fills it in."""


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

data_options = gathered(
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
