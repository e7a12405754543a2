"""`dspark sweep` and `dspark compare`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("sweep")
@click.argument("config_file", metavar="CONFIG", type=click.Path(path_type=Path))
@click.option("--cache", type=click.Path(path_type=Path), required=True, help="A complete cache.")
@click.option(
    "--runs", type=click.Path(path_type=Path), required=True, help="Directory to write the runs into."
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="TABLE.KEY=VALUE[,VALUE...]",
    help="Override a setting; with several values, train one run with each.",
)
@click.option("--device", default="auto", show_default=True, help="cuda, cuda:1, cpu, ...")
@click.option(
    "--jobs", type=click.IntRange(min=1), help="Runs trained at once. Default: the number of GPUs, or 1."
)
def sweep_command(
    config_file: Path,
    cache: Path,
    runs: Path,
    settings: tuple[str, ...],
    device: str,
    jobs: int | None,
) -> None:
    """Train a grid of drafts over one cache, and compare them.

    CONFIG is what the runs have in common. Every combination of the values of --set is a run in a folder of
    --runs, with its output in a log beside it; brackets and quotes keep commas together, as in
    `--set draft.target_layer_ids=[0,2],[0,4]`. The same command again continues unfinished runs, tries
    failed ones again and leaves complete ones as they are.
    """
    from train.experiments.sweep import sweep

    sweep(cache, config_file, runs, settings, device=device, jobs=jobs, say=click.echo)


@click.command("compare")
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--format",
    "style",
    type=click.Choice(["text", "csv", "json"]),
    default="text",
    show_default=True,
    help="csv and json hold raw numbers: seconds, tokens a second.",
)
def compare_command(runs: tuple[Path, ...], style: str) -> None:
    """Put runs side by side: the settings that differ, and how good each draft is.

    A RUN that is a folder of runs stands for all of them. Runs at work are shown as far as they are.
    """
    from train.experiments.compare import FORMATS, compare

    click.echo(FORMATS[style](compare(runs)), nl=False)
