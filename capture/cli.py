"""`dspark capture`, `dspark plan` and `dspark preview`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from capture.options import DataOptions, data_options, target_or_example_options
from pipeline.errors import UsageError
from pipeline.options import (
    CONTEXT_CODECS,
    DEFAULT_CONTEXT_CODEC,
    DEFAULT_LAST_CODEC,
    LAST_CODECS,
    parse_layer_ids,
)
from pipeline.target_model.options import TargetOptions

if TYPE_CHECKING:  # so that --help imports no torch
    from capture.plan import CaptureOptions
    from pipeline.cache import Manifest


_AT_LEAST_1, _AT_LEAST_2 = click.IntRange(min=1), click.IntRange(min=2)


def _plan_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that decide what a cache is and where; the command gets them as one `CaptureOptions`."""

    @functools.wraps(command)
    def gather(
        target: TargetOptions,
        data: DataOptions,
        cache: Path,
        layers: tuple[int, ...] | None,
        batch_tokens: int,
        shard_tokens: int,
        context_codec: str,
        last_codec: str,
        force: bool,
        **others: Any,
    ) -> Any:
        if (target.target is None) != (not data.data):
            raise UsageError("give --target and --data together, or neither for the example")
        from capture.plan import CaptureOptions

        options = CaptureOptions(
            target=target,
            data=data,
            cache=cache,
            layer_ids=layers,
            batch_tokens=batch_tokens,
            shard_tokens=shard_tokens,
            context_codec=context_codec,
            last_codec=last_codec,
            force=force,
        )
        return command(options, **others)

    for option in reversed(
        [
            click.option(
                "--cache", type=click.Path(path_type=Path), required=True, help="Directory to write."
            ),
            click.option(
                "--layers",
                callback=parse_layer_ids,
                help="Layer ids, as 1,9,17. Default: an even spread of five.",
            ),
            click.option(
                "--batch-tokens",
                type=_AT_LEAST_2,
                default=4096,
                show_default=True,
                help="Tokens of a forward, padding included.",
            ),
            click.option(
                "--shard-tokens",
                type=_AT_LEAST_2,
                default=32768,
                show_default=True,
                help="Tokens of a shard.",
            ),
            click.option(
                "--context-codec",
                type=click.Choice(CONTEXT_CODECS),
                default=DEFAULT_CONTEXT_CODEC,
                show_default=True,
                help="How context features are stored: see `dspark plan` for what each costs.",
            ),
            click.option(
                "--last-codec",
                type=click.Choice(LAST_CODECS),
                default=DEFAULT_LAST_CODEC,
                show_default=True,
                help="How the teacher's states are stored.",
            ),
            click.option("--force", is_flag=True, help="Start though the disk can't hold the cache."),
        ]
    ):
        gather = option(gather)
    return target_or_example_options(data_options(gather))


@click.command("capture")
@_plan_options
@click.option(
    "--worker",
    metavar="I/N",
    help="This is process I of N, from 0, that fill the cache together. Under torchrun: its rank.",
)
@click.pass_context
def capture_command(ctx: click.Context, options: CaptureOptions, worker: str | None) -> None:
    """Run the hooked target once over conversations and write a cache.

    Stopped at any moment, the same command continues. Any number of processes may work on one cache at
    once, on one machine or several. A cache that is there already is reused without loading the target;
    one of another target, data or setting is refused. With --cache alone, a complete cache is reused
    whatever it holds, and the command says what that is.
    """
    from capture.workers import worker_place
    from pipeline.cache.manifest import MANIFEST, read_manifest

    place = worker_place(worker)  # wrong ones are refused whatever is there already
    given = {name for name in ctx.params if ctx.get_parameter_source(name) == ParameterSource.COMMANDLINE}
    if given <= {"cache", "device", "worker"} and (options.cache / MANIFEST).is_file():
        manifest = read_manifest(options.cache)
        if manifest.status == "complete":
            from pipeline.cache import CacheReader

            CacheReader(options.cache).check_shards()  # refused here if damaged, not after a run's set-up
            if worker or place.rank == 0:  # of torchrun's processes one says so
                _report(manifest, options.cache, reused=True)
            return
    from capture.run import capture
    from pipeline.quiet import quiet_transformers

    quiet_transformers()
    captured = capture(dataclasses.replace(options, worker=worker))
    if captured.complete:
        _report(captured.manifest, options.cache, reused=captured.reused)
    else:
        click.echo(
            f"cache {options.cache}: shards written by this process: {captured.shards}; "
            "others are at work on the rest"
        )


@click.command("plan")
@_plan_options
@click.option(
    "--probe", is_flag=True, help="Load the target and run a few batches, for tokens/s and the time."
)
def plan_command(options: CaptureOptions, probe: bool) -> None:
    """Say what `dspark capture` with the same options will do and cost, without loading any weights."""
    from capture.plan import show_plan
    from pipeline.quiet import quiet_transformers

    quiet_transformers()
    show_plan(options, probing=probe)


@click.command("preview")
@target_or_example_options
@data_options
@click.option(
    "--row",
    type=_AT_LEAST_1,
    help="Show that row of the (first) source, from 1, instead of the first samples.",
)
@click.option("--count", type=_AT_LEAST_1, default=3, show_default=True, help="Samples to show.")
def preview_command(target: TargetOptions, data: DataOptions, row: int | None, count: int) -> None:
    """Show samples as the target sees them: supervised tokens in green, then lengths over all the data.

    Nothing is captured, and no weights are loaded.
    """
    from capture.data.preview import preview
    from pipeline.quiet import quiet_transformers

    quiet_transformers()
    for line in preview(target, data, row=row, count=count):
        click.echo(line)  # click strips the colours where the output is no terminal


def _report(manifest: Manifest, cache: Path, *, reused: bool) -> None:
    from pipeline.cache.tools.inspect import summary_lines

    state = "already complete, reused without running the target" if reused else "complete"
    click.echo(f"cache {cache}: {state}")
    for line in summary_lines(manifest):
        click.echo(line)
    rows = ", ".join(f"{name} {count:,}" for name, count in sorted(manifest.rows.items()))
    click.echo(f"  rows: {rows}; teacher total variation {_teacher_tv(manifest)}")


def _teacher_tv(manifest: Manifest) -> str:
    fidelity = manifest.fidelity
    return f"{fidelity.get('teacher_tv_mean', float('nan')):.4f}"
