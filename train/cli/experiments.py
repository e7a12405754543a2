"""`dspark sweep` and `dspark compare`."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.options import PLACE
from pipeline.remote.address import Place


@click.command("sweep")
@click.argument("config_files", metavar="CONFIG...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--cache", type=PLACE, required=True, help="A complete cache, or its URL.")
@click.option(
    "--runs", type=click.Path(path_type=Path), required=True, help="Directory to write the runs into."
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="TABLE.KEY=VALUE[,VALUE...]",
    help="Override a setting. With several values, train one run per value.",
)
@click.option("--device", default="auto", show_default=True, help="cuda, cuda:1, cpu, ...")
@click.option(
    "--jobs", type=click.IntRange(min=1), help="Runs to train at once. Default: the number of GPUs, or 1."
)
def sweep_command(
    config_files: tuple[Path, ...],
    cache: Place,
    runs: Path,
    settings: tuple[str, ...],
    device: str,
    jobs: int | None,
) -> None:
    """Train a grid of drafts over one cache, and compare them.

    CONFIG has the settings that the runs share. With several, each one is trained, with every --set: they
    may be of several kinds of draft, and their names begin the names of the runs. Every combination of the
    values of --set is a run in a folder of --runs, with its log next to the folder. Commas in brackets or
    quotes do not separate values, as in `--set draft.target_layer_ids=[0,2],[0,4]`. The same command again
    continues unfinished runs, retries failed ones and skips complete ones.
    """
    from train.experiments.sweep import sweep

    sweep(cache, config_files, runs, settings, device=device, jobs=jobs, say=click.echo)


@click.command("compare")
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--format",
    "style",
    type=click.Choice(["text", "csv", "json"]),
    default="text",
    show_default=True,
    help="csv and json hold raw numbers: seconds, tokens per second.",
)
def compare_command(runs: tuple[Path, ...], style: str) -> None:
    """Compare runs: the settings that differ, and the figures of each draft.

    A RUN that is a folder of runs stands for all of them. Unfinished runs are shown with their progress.
    """
    from train.experiments.compare import FORMATS, compare

    click.echo(FORMATS[style](compare(runs)), nl=False)
