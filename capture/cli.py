"""`dspark capture` and `dspark regenerate`."""

from __future__ import annotations

from pathlib import Path

import click
from click.core import ParameterSource

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
@click.option("--target", help="Hugging Face directory or Hub id. Default: the example's target.")
@click.option(
    "--data", type=click.Path(path_type=Path), help="JSONL of conversations. Default: the example's."
)
@click.option("--cache", type=click.Path(path_type=Path), required=True, help="Directory to write.")
@click.option("--layers", callback=_layer_ids, help="Layer ids, as 1,9,17. Default: an even spread of five.")
@click.option(
    "--max-length", type=_AT_LEAST_2, default=4096, show_default=True, help="Tokens a sample is cut at."
)
@click.option(
    "--batch-tokens", type=_AT_LEAST_2, default=4096, show_default=True, help="Tokens of a forward."
)
@click.option("--shard-tokens", type=_AT_LEAST_2, default=32768, show_default=True, help="Tokens of a shard.")
@click.option("--device", default="auto", show_default=True, help="cuda, cuda:1, cpu, ...")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "bfloat16", "float16", "float32"]),
    default="auto",
    show_default=True,
    help="What the target computes in. auto: the checkpoint's own, or float32 where bf16 is emulated.",
)
@click.pass_context
def capture_command(
    ctx: click.Context,
    target: str | None,
    data: Path | None,
    cache: Path,
    layers: tuple[int, ...] | None,
    max_length: int,
    batch_tokens: int,
    shard_tokens: int,
    device: str,
    dtype: str,
) -> None:
    """Run the hooked target once over conversations and write a cache.

    Stopped at any moment, the same command continues. A cache that is there already is reused
    without loading the target; one of another target, data or setting is refused. With --cache alone,
    a complete cache is reused whatever it holds, and the command says what that is.
    """
    if (target is None) != (data is None):
        raise UsageError("give --target and --data together, or neither for the example")
    from pipeline.cache.manifest import MANIFEST, read_manifest

    given = {name for name in ctx.params if ctx.get_parameter_source(name) == ParameterSource.COMMANDLINE}
    if given <= {"cache", "device"} and (cache / MANIFEST).is_file():
        manifest = read_manifest(cache)
        if manifest.status == "complete":
            from pipeline.cache import CacheReader

            CacheReader(
                cache
            ).check_shards()  # a damaged one is refused here, not after the set-up of a training run
            _report(manifest, cache, reused=True)
            return
    from capture.example import EXAMPLE_DATA, example_target
    from capture.run import CaptureOptions, capture
    from pipeline.quiet import quiet_transformers

    quiet_transformers()
    if target is None or data is None:
        target, data = str(example_target()), EXAMPLE_DATA
    options = CaptureOptions(
        target=target,
        data=data,
        cache=cache,
        layer_ids=layers,
        max_length=max_length,
        batch_tokens=batch_tokens,
        shard_tokens=shard_tokens,
        device=device,
        dtype=dtype,
    )
    manifest, reused = capture(options)
    _report(manifest, cache, reused=reused)


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
