"""Options of `capture`, `plan`, `preview` and `regenerate`; importing this imports no torch."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from capture.engines.options import VLLM, EngineOptions, engine_options
from capture.one_pass.options import AnswerOptions, answer_options
from pipeline.chat.rows import FORMS
from pipeline.errors import UsageError
from pipeline.options import (
    CONTEXT_CODECS,
    DEFAULT_CONTEXT_CODEC,
    DEFAULT_LAST_CODEC,
    HIDDEN_CHOICES,
    LAST_CODECS,
    LAST_HIDDEN_CHOICES,
    PLACE,
    Command,
    check_hidden,
    check_last_codec,
    gathered,
    parse_layer_ids,
)
from pipeline.remote.address import Address, Place
from pipeline.target_model.options import TargetOptions, target_options

# Template variables that rendering a conversation sets.
_SET_BY_RENDERING = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")


@dataclass(frozen=True, kw_only=True)
class ReadingOptions:
    """Rows to read, and the chat template that renders them."""

    data: tuple[str, ...] = ()
    """Files, folders, Hub ids and `-`; none of them stands for the example's conversations."""
    split: str | None = None
    subset: str | None = None
    format: str = "auto"
    chat_template: str | None = None
    template_arg: tuple[str, ...] = ()
    num_samples: int | None = None
    bad_rows: str = "fail"

    def template_arguments(self) -> dict[str, Any]:
        """Return the template variables of `--template-arg name=value`.

        A value that is valid JSON (true, 3) is parsed; any other is kept as text.

        Raises:
            UsageError: an argument without a name or an equals sign, or a name that rendering sets.
        """
        arguments = {}
        for argument in self.template_arg:
            name, sign, value = argument.partition("=")
            if not sign or not name.isidentifier():
                raise UsageError(f"expected --template-arg name=value, got {argument!r}")
            if name in _SET_BY_RENDERING:
                raise UsageError(f"--template-arg {name} is set for every conversation: leave it out")
            try:
                arguments[name] = json.loads(value)
            except ValueError:
                arguments[name] = value
        return arguments

    def template_text(self) -> str | None:
        """Return the text of `--chat-template`; None without it. Raises UsageError if it can't be read."""
        if not self.chat_template:
            return None
        try:
            return Path(self.chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"--chat-template {self.chat_template}: expected a readable Jinja file ({error})"
            ) from None


@dataclass(frozen=True, kw_only=True)
class DataOptions(ReadingOptions):
    """Conversations to read, and how they become samples."""

    supervise: str = "all"
    mask_reasoning: bool = False
    max_length: int = 4096
    too_long: str = "cut"
    min_supervised: int = 0
    shuffle: bool = False
    seed: int = 0
    tokenize_workers: int | None = None

    def settings(self) -> dict[str, str]:
        """Return the manifest's record of the options: each one that has a value, as text."""
        left_out = ("data", "tokenize_workers")
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in left_out}
        if not self.shuffle:
            del values["seed"]
        if self.chat_template:  # the identity holds the template's hash; its path is valid here only
            values["chat_template"] = Path(self.chat_template).name
        return {
            name: " ".join(value) if isinstance(value, tuple) else str(value).lower()
            for name, value in values.items()
            if value not in (None, (), False)
        }


@dataclass(frozen=True, kw_only=True)
class CaptureOptions:
    """Target, data and cache of a capture."""

    target: TargetOptions
    data: DataOptions
    cache: Place
    """Directory, or address in an object store, that the cache is written to."""
    layer_ids: tuple[int, ...] | None = None
    """None: five evenly spread ids, see `pipeline.features.default_layer_ids`."""
    batch_tokens: int = 4096
    """Tokens per target forward, padding included."""
    shard_tokens: int = 32768
    """Tokens per shard: 0.3 GB at Qwen3-4B's size, and 40,000 shards for the paper's 1.3M conversations."""
    context_codec: str = DEFAULT_CONTEXT_CODEC
    """Codec of context features, a name in `pipeline.cache.codecs.CODECS`."""
    last_codec: str = DEFAULT_LAST_CODEC
    """Codec of last hidden states, a name in `pipeline.cache.codecs.CODECS`."""
    last_hidden: str = "post_norm"
    """none: last hidden states are not stored, and `last_codec` does not count."""
    hidden: str = "labels"
    """Tokens whose last hidden states are stored: label rows, or all-tokens."""
    share_prefixes: bool = False
    """Store the context of tokens that samples begin with in common once."""
    bad_states: str = "fail"
    """fail: a sample with bad states stops the capture; skip: it is recorded. Not part of the identity."""
    max_bad_states: float = 0.001
    """Maximum share of skipped samples; one is always allowed. Not part of the identity."""
    force: bool = False
    """Start even if the disk can't hold the cache."""
    staging_bytes: int | None = None
    """Most bytes of shards on this machine's disk, per process, on their way to an object store."""
    engine: EngineOptions = field(default_factory=EngineOptions)
    answers: AnswerOptions = field(default_factory=AnswerOptions)
    no_proof: bool = False
    """Warn, where the proof would refuse a target whose predictions are impossible for the right model."""


target_or_example_options = target_options(
    help="Hugging Face directory or Hub id. Default: the example's target."
)
"""Add the options of `TargetOptions`. Without `--target`, `capture.example.with_example` fills it in."""

_reading = [
    click.option(
        "--data",
        multiple=True,
        help="JSONL, JSON, CSV, TSV, Parquet or Arrow file, a folder of them, a folder saved by datasets, a "
        "Hub dataset id, or - for standard input. May be given several times. Default of capture, plan and "
        "preview: the example's conversations.",
    ),
    click.option("--split", help="Split of a Hub dataset or a saved one.  [default: train]"),
    click.option("--subset", help="Subset (configuration) of a Hub dataset."),
    click.option(
        "--format",
        type=click.Choice(["auto", *FORMS]),
        default="auto",
        show_default=True,
        help="Form of the rows. auto: detected from each source's first row.",
    ),
    click.option("--chat-template", help="Jinja file to use instead of the tokenizer's own template."),
    click.option(
        "--template-arg",
        multiple=True,
        metavar="NAME=VALUE",
        help="Extra template variable, such as enable_thinking=false. May be given several times.",
    ),
    click.option("--num-samples", type=click.IntRange(min=1), help="Maximum number of samples."),
    click.option(
        "--bad-rows",
        type=click.Choice(["fail", "skip"]),
        default="fail",
        show_default=True,
        help="Stop at a row that can't be used, or skip and count it.",
    ),
]
reading_options = gathered(ReadingOptions, "reading", _reading)
"""Add the options of `ReadingOptions` to a click command, which receives them as `reading`."""

data_options = gathered(
    DataOptions,
    "data",
    [
        *_reading,
        click.option(
            "--supervise",
            type=click.Choice(["all", "last"]),
            default="all",
            show_default=True,
            help="Train on every assistant turn, or only on the last one.",
        ),
        click.option("--mask-reasoning", is_flag=True, help="Exclude <think>...</think> from the loss."),
        click.option(
            "--max-length",
            type=click.IntRange(min=2),
            default=4096,
            show_default=True,
            help="Maximum tokens per sample.",
        ),
        click.option(
            "--too-long",
            type=click.Choice(["cut", "drop"]),
            default="cut",
            show_default=True,
            help="Cut longer samples, or drop them.",
        ),
        click.option(
            "--min-supervised",
            type=click.IntRange(min=0),
            default=0,
            show_default=True,
            help="Minimum supervised tokens per sample.",
        ),
        click.option("--shuffle", is_flag=True, help="Shuffle the samples before --num-samples applies."),
        click.option("--seed", default=0, show_default=True, help="Seed of --shuffle."),
        click.option(
            "--tokenize-workers",
            type=click.IntRange(min=1),
            help="Tokenising processes.  [default: one per core, 16 at most]",
        ),
    ],
)
"""Add the options of `DataOptions` to a click command, which receives them as `data`."""


def _parse_share(_ctx: click.Context, _param: click.Parameter, text: str) -> float:
    """Parse `--max-bad-states`, as a click callback. Raises UsageError."""
    number, percent, rest = text.strip().partition("%")
    try:
        share = float(number) / (100 if percent else 1)
    except ValueError:
        share = -1.0
    if rest or not 0 <= share <= 1:
        raise UsageError(f"--max-bad-states expects a share such as 0.1% or 0.001, got {text!r}")
    return share


_own_options = gathered(
    CaptureOptions,
    "options",
    [
        click.option(
            "--cache", type=PLACE, required=True, help="Directory to write, or URL of an object store."
        ),
        click.option(
            "--layers",
            "layer_ids",
            callback=parse_layer_ids,
            help="Layer ids, as 1,9,17. Default: five, evenly spread.",
        ),
        click.option(
            "--batch-tokens",
            type=click.IntRange(min=2),
            default=4096,
            show_default=True,
            help="Tokens per forward, padding included.",
        ),
        click.option(
            "--shard-tokens",
            type=click.IntRange(min=2),
            default=32768,
            show_default=True,
            help="Tokens per shard.",
        ),
        click.option(
            "--context-codec",
            type=click.Choice(CONTEXT_CODECS),
            default=DEFAULT_CONTEXT_CODEC,
            show_default=True,
            help="Codec of context features; `dspark plan` prints the size of each.",
        ),
        click.option(
            "--last-codec",
            type=click.Choice(LAST_CODECS),
            default=DEFAULT_LAST_CODEC,
            show_default=True,
            help="Codec of the teacher's last hidden states.",
        ),
        click.option(
            "--last-hidden",
            type=click.Choice(LAST_HIDDEN_CHOICES),
            default="post_norm",
            show_default=True,
            help="Store the states after the target's final norm, or none, for drafts that learn from the "
            "data's tokens alone.",
        ),
        click.option(
            "--hidden",
            type=click.Choice(HIDDEN_CHOICES),
            default="labels",
            show_default=True,
            help="Tokens whose last hidden states are stored: those before supervised tokens, which training "
            "needs, or all, for drafts that read every one.",
        ),
        click.option(
            "--share-prefixes",
            is_flag=True,
            help="Store the context of what conversations begin with in common once: a system prompt, tools, "
            "a question with several answers.",
        ),
        click.option(
            "--bad-states",
            type=click.Choice(["fail", "skip"]),
            default="fail",
            show_default=True,
            help="Stop at a sample whose states are not finite or all zero, or that does not fit the device; "
            "or skip it, and record that in the cache.",
        ),
        click.option(
            "--max-bad-states",
            callback=_parse_share,
            default="0.1%",
            show_default=True,
            metavar="SHARE",
            help="Maximum share of samples that --bad-states skip may skip.",
        ),
        click.option("--force", is_flag=True, help="Start even if the disk can't hold the cache."),
        click.option(
            "--staging-bytes",
            type=click.IntRange(min=1),
            help="With a URL: most bytes of shards on this machine's disk, per process, before they are "
            "uploaded; one always fits. Default: three shards.",
        ),
        click.option(
            "--no-proof",
            is_flag=True,
            help="Only warn where the target predicts the data so badly that its weights must be broken.",
        ),
    ],
)


def _given() -> set[str]:
    """Return the names of the parameters on the command line."""
    context = click.get_current_context()
    return {n for n in context.params if context.get_parameter_source(n) == ParameterSource.COMMANDLINE}


def capture_options(command: Command) -> Command:
    """Add the options of `CaptureOptions` to a click command, which receives them as `options`.

    Raises:
        UsageError: when the command runs with one of --target and --data only, or with options that
            contradict each other.
    """

    @functools.wraps(command)
    def checked(*args: Any, options: CaptureOptions, **others: Any) -> Any:
        if (options.target.target is None) != (not options.data.data):
            raise UsageError("give --target and --data together, or neither for the example")
        source = click.get_current_context().get_parameter_source("last_codec")
        given = source not in (None, ParameterSource.DEFAULT)
        check_last_codec(options.last_hidden, options.last_codec if given else None)
        check_hidden(options.last_hidden, options.hidden)
        if options.staging_bytes is not None and not isinstance(options.cache, Address):
            raise UsageError(
                f"--staging-bytes is of captures to a URL, and --cache is the directory {options.cache}: "
                "leave it out"
            )
        options.engine.check()
        options.answers.check(options.data.mask_reasoning, _given())
        if options.share_prefixes and options.answers.regenerate and options.engine.engine == VLLM:
            raise UsageError(
                "--share-prefixes needs to know the answers before it plans: run `dspark regenerate` first, "
                "and capture its output; or leave it out"
            )
        options.engine.check_target(options.target, regenerates=options.answers.regenerate)
        return command(*args, options=options, **others)

    return target_or_example_options(data_options(engine_options(answer_options(_own_options(checked)))))
