"""`dspark capture`, `dspark plan` and `dspark preview`."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from capture.options import (
    CaptureOptions,
    DataOptions,
    capture_options,
    data_options,
    target_or_example_options,
)
from pipeline.target_model.options import TargetOptions

if TYPE_CHECKING:  # so that --help imports no torch
    from capture.engines.group import Group
    from pipeline.cache import Manifest
    from pipeline.remote.address import Place

_AT_LEAST_1 = click.IntRange(min=1)


@click.command("capture")
@capture_options
@click.option(
    "--worker",
    metavar="I/N",
    help="Run as process I, from 0, of N that fill the cache together. Default under torchrun: its rank.",
)
@click.pass_context
def capture_command(ctx: click.Context, options: CaptureOptions, worker: str | None) -> None:
    """Run the hooked target once over conversations and write a cache.

    If the command is stopped, run it again to continue. Any number of processes, on one machine or
    several, may fill one cache at the same time. A complete cache of the same target, data and settings is
    reused without loading the target; a directory with any other capture is refused. With --cache alone,
    any complete cache is reused and described.
    """
    from capture.workers import worker_place

    place = worker_place(worker, options.engine)  # refuses a wrong --worker even if the cache is complete
    given = {name for name in ctx.params if ctx.get_parameter_source(name) == ParameterSource.COMMANDLINE}
    complete = _complete_cache(options.cache) if given <= {"cache", "device", "worker"} else None
    if complete is not None:
        if worker or place.rank == 0:  # under torchrun, the first process speaks
            _report(complete, options.cache, reused=True)
        return
    from capture.engines.tensor_parallel import follow, follows
    from capture.run import capture
    from pipeline.quiet import quiet_transformers

    quiet_transformers()
    if follows(options.engine):  # the first process speaks
        follow(options.engine, options.target)
        return
    captured = capture(options, place)
    if captured.complete:
        _report(captured.manifest, options.cache, reused=captured.reused)
    else:
        click.echo(
            f"cache {options.cache}: shards written by this process: {captured.shards}; "
            "others are at work on the rest"
        )


@click.command("plan")
@capture_options
@click.option(
    "--probe",
    "probing",
    is_flag=True,
    help="Load the target and run a few batches to predict tokens/s and the time.",
)
def plan_command(options: CaptureOptions, probing: bool) -> None:
    """Print what `dspark capture` with the same options will do and cost, without loading any weights."""
    from capture.engines.group import open_group
    from capture.engines.tensor_parallel import follow, follows
    from pipeline.quiet import quiet_transformers

    quiet_transformers()
    if probing and follows(options.engine):
        follow(options.engine, options.target)
        return
    with open_group(options.engine) if probing else nullcontext() as group:
        _print_plan(options, probing, group)


def _print_plan(options: CaptureOptions, probing: bool, group: Group | None) -> None:
    from capture.data.summary import position_lines
    from capture.plan import check_room, plan_lines, probe
    from capture.prepare import prepare
    from pipeline.errors import CacheError

    prepared = prepare(options)
    for line in plan_lines(prepared):
        click.echo(line)
    for line in position_lines(prepared.target.config, prepared.data.facts.lengths):
        click.echo(line, err=True)
    try:
        prepared.check_directory()
    except CacheError as error:
        click.echo(f"warning: {error}", err=True)
    if probing:
        click.echo(probe(prepared, group))
    check_room(prepared)


@click.command("preview")
@target_or_example_options
@data_options
@click.option(
    "--row",
    type=_AT_LEAST_1,
    help="Show this row of the (first) source, counted from 1, instead of the first samples.",
)
@click.option("--count", type=_AT_LEAST_1, default=3, show_default=True, help="Samples to show.")
def preview_command(target: TargetOptions, data: DataOptions, row: int | None, count: int) -> None:
    """Show samples as the target sees them, supervised tokens in green, and the lengths of all samples.

    Nothing is captured, and no weights are loaded.
    """
    from capture.data.preview import preview
    from pipeline.quiet import quiet_transformers

    quiet_transformers()
    for line in preview(target, data, row=row, count=count):
        click.echo(line)  # drops the colours where stdout is no terminal


def _complete_cache(cache: Place) -> Manifest | None:
    """Return the manifest of a complete cache; None if there is no such cache.

    Raises:
        CacheError: a shard is missing or has another size. A run would notice that only after its set-up.
    """
    from capture.prepare import existing

    manifest = existing(cache)
    if manifest is None or manifest.status != "complete":
        return None
    from pipeline.cache import CacheReader

    CacheReader(cache).check_shards()
    return manifest


def _report(manifest: Manifest, cache: Place, *, reused: bool) -> None:
    from pipeline.cache.tools.inspect import summary_lines

    state = "already complete, reused without running the target" if reused else "complete"
    click.echo(f"cache {cache}: {state}")
    for line in summary_lines(manifest):
        click.echo(line)
    rows = ", ".join(f"{name} {count:,}" for name, count in sorted(manifest.rows.items()))
    variation = manifest.fidelity.get("teacher_tv_mean", float("nan"))
    teacher = f"; teacher total variation {variation:.4f}" * manifest.identity.features.has_last_hidden
    click.echo(f"  rows: {rows}{teacher}")
