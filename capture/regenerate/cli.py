"""`dspark regenerate`."""

from __future__ import annotations

from pathlib import Path

import click

from capture.options import TargetOptions, target_options
from pipeline.errors import UsageError

_AT_LEAST_1 = click.IntRange(min=1)


@click.command("regenerate")
@target_options
@click.option("--data", type=click.Path(path_type=Path), required=True, help="JSONL of conversations.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="JSONL to write, in input order.")
@click.option(
    "--max-new-tokens", type=_AT_LEAST_1, default=512, show_default=True, help="Tokens of an answer at most."
)
@click.option(
    "--temperature", type=click.FloatRange(min=0), default=0.7, show_default=True, help="0 is greedy."
)
@click.option(
    "--top-k", type=_AT_LEAST_1, default=50, show_default=True, help="Sample from the k likeliest tokens."
)
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Sample from the likeliest tokens that make up this share.",
)
@click.option(
    "--batch-size", type=_AT_LEAST_1, default=64, show_default=True, help="Conversations of one batch."
)
@click.option("--seed", default=0, show_default=True)
def regenerate_command(target: TargetOptions, data: Path, out: Path, **sampling) -> None:
    """Replace every assistant turn by the target's own answer, turn by turn."""
    from capture.conversations import read_conversations
    from capture.example import example_target
    from capture.load import load_config, load_target, load_tokenizer, resolve_directory, resolve_dtype
    from capture.regenerate import regenerate, write_jsonl
    from pipeline.device import resolve_device
    from pipeline.quiet import quiet_transformers

    quiet_transformers()
    places, conversations = zip(*read_conversations(data), strict=True)
    if not out.parent.is_dir():
        raise UsageError(f"--out {out}: no such directory {out.parent}; make it first")
    directory = resolve_directory(target.target or str(example_target()))
    place = resolve_device(target.device)
    model = load_target(directory, resolve_dtype(target.dtype, load_config(directory), place), place)
    tokenizer = load_tokenizer(directory)
    write_jsonl(out, regenerate(model, tokenizer, list(conversations), where=places, **sampling))
    click.echo(f"{out}: {len(conversations):,} conversations in the target's own words")
