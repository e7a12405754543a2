"""`dspark train`."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.options import PLACE
from pipeline.process import torchrun_place
from pipeline.remote.address import Place
from train.runs.names import LATEST


def _explain(ctx: click.Context, _option: click.Parameter, asked: bool) -> None:
    """Print every setting and exit, whatever the other options are."""
    if asked:
        from train.cli.explain import explain

        for line in explain():
            click.echo(line)
        ctx.exit()


@click.command("train")
@click.option(
    "--explain",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_explain,
    help="Print every setting with its default and the paper's value, and exit.",
)
@click.option("--cache", type=PLACE, required=True, help="A complete cache, or its URL.")
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    help="TOML file. Default: the paper's settings.",
)
@click.option(
    "--run",
    "--run-dir",  # torchrun takes --run for its own --run-path before Python 3.12.8
    "run",
    type=click.Path(path_type=Path),
    required=True,
    help="Directory of the run, new or to continue.",
)
@click.option("--set", "overrides", multiple=True, metavar="TABLE.KEY=VALUE", help="Override a setting.")
@click.option("--device", default="auto", show_default=True, help="cuda, cuda:1, cpu, ...")
@click.option("--fresh", is_flag=True, help="Clear the run if it exists, and start over.")
@click.option(
    "--profile",
    type=click.IntRange(min=1),
    metavar="N",
    help="Write a Chrome trace of N steps to RUN/trace.json (open it in chrome://tracing or Perfetto).",
)
def train_command(
    cache: Place,
    config_file: Path | None,
    run: Path,
    overrides: tuple[str, ...],
    device: str,
    fresh: bool,
    profile: int | None,
) -> None:
    """Train a draft from a cache, or continue a run. The target is never loaded.

    If training is stopped or killed, the same command continues from the last checkpoint. Under torchrun,
    all processes share each step.
    """
    from pipeline import config as configuration
    from train.draft.settings import run_config

    values = configuration.load_toml(config_file) if config_file else {}
    where = str(config_file or "config")
    config = run_config(configuration.apply_overrides(values, overrides), where)
    from pipeline.quiet import quiet_transformers
    from train.eval.validate import format_validation
    from train.runs.open import run_to_continue
    from train.runtime.console import say
    from train.trainer.trainer import train

    quiet_transformers()
    run = run_to_continue(run)
    result = train(cache, config, run, device=device, fresh=fresh, profile_steps=profile or 0)
    if torchrun_place().rank == 0:
        if result:
            say(format_validation(result), err=False)
        say(f"draft: {run / LATEST}", err=False)
