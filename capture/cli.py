"""`dspark capture` and `dspark preview`."""

from __future__ import annotations

from pathlib import Path

import click
from click.core import ParameterSource

from capture.options import DataOptions, TargetOptions, data_options, target_options
from pipeline.errors import UsageError


def _layer_ids(_ctx: click.Context, _param: click.Parameter, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(
            f"--layers expects integers separated by commas, such as 1,9,17; got {text!r}"
        ) from None


_AT_LEAST_1, _AT_LEAST_2 = click.IntRange(min=1), click.IntRange(min=2)


@click.command("capture")
@target_options
@data_options
@click.option("--cache", type=click.Path(path_type=Path), required=True, help="Directory to write.")
@click.option("--layers", callback=_layer_ids, help="Layer ids, as 1,9,17. Default: an even spread of five.")
@click.option(
    "--batch-tokens", type=_AT_LEAST_2, default=4096, show_default=True, help="Tokens of a forward."
)
@click.option("--shard-tokens", type=_AT_LEAST_2, default=32768, show_default=True, help="Tokens of a shard.")
@click.pass_context
def capture_command(
    ctx: click.Context,
    target: TargetOptions,
    data: DataOptions,
    cache: Path,
    layers: tuple[int, ...] | None,
    batch_tokens: int,
    shard_tokens: int,
) -> None:
    """Run the hooked target once over conversations and write a cache.

    Stopped at any moment, the same command continues. A cache that is there already is reused
    without loading the target; one of another target, data or setting is refused. With --cache alone,
    a complete cache is reused whatever it holds, and the command says what that is.
    """
    if (target.target is None) != (not data.data):
        raise UsageError("give --target and --data together, or neither for the example")
    from pipeline.cache.manifest import MANIFEST, read_manifest

    given = {name for name in ctx.params if ctx.get_parameter_source(name) == ParameterSource.COMMANDLINE}
    if given <= {"cache", "device"} and (cache / MANIFEST).is_file():
        manifest = read_manifest(cache)
        if manifest.status == "complete":
            from pipeline.cache import CacheReader

            CacheReader(cache).check_shards()  # a damaged one is refused here, not after a run's set-up
            _report(manifest, cache, reused=True)
            return
    from capture.run import CaptureOptions, capture
    from pipeline.quiet import quiet_transformers

    quiet_transformers()
    options = CaptureOptions(
        target=target,
        data=data,
        cache=cache,
        layer_ids=layers,
        batch_tokens=batch_tokens,
        shard_tokens=shard_tokens,
    )
    manifest, reused = capture(options)
    _report(manifest, cache, reused=reused)


@click.command("preview")
@target_options
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
    from capture.preview import preview
    from pipeline.quiet import quiet_transformers

    quiet_transformers()
    for line in preview(target, data, row=row, count=count):
        click.echo(line)  # click strips the colours where the output is no terminal


def _report(manifest, cache: Path, *, reused: bool) -> None:
    target, features = manifest.identity.target, manifest.identity.features
    state = "already complete, reused without running the target" if reused else "complete"
    click.echo(f"cache {cache}: {state}")
    click.echo(
        f"  {target.name} ({target.architecture}, {target.dtype}), layers {list(features.layer_ids)}, "
        f"{features.context_codec} context, {features.last_codec} last hidden"
    )
    click.echo(
        f"  {manifest.num_samples:,} samples, {manifest.num_tokens:,} tokens, "
        f"{manifest.num_last_rows:,} labels, {len(manifest.plan)} shards, {manifest.num_bytes / 1e6:,.1f} MB"
    )
    rows = ", ".join(f"{name} {count:,}" for name, count in sorted(manifest.rows.items()))
    click.echo(f"  rows: {rows}; teacher total variation {manifest.fidelity['teacher_tv_mean']:.4f}")
