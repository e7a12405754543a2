"""`dspark tune`."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.options import PLACE
from pipeline.remote.address import Place


@click.command("tune")
@click.option("--cache", type=PLACE, required=True, help="A complete cache, or its URL.")
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    required=True,
    help="TOML file that trials differ from.",
)
@click.option(
    "--runs",
    "folder",
    type=click.Path(path_type=Path),
    required=True,
    help="Directory of the tune, new or to continue.",
)
@click.option("--budget", required=True, metavar="TIME", help="Time in all, as 15m, 2h or 1h30m.")
@click.option(
    "--search",
    multiple=True,
    metavar="TABLE.KEY=LOW..HIGH|VALUE,VALUE,...",
    help="Search a setting: a range, logarithmic if it is above 0, or choices. Default: those of the kind.",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="TABLE.KEY=VALUE",
    help="Override a setting in all trials.",
)
@click.option("--shortest", type=click.IntRange(min=1), help="Optimiser steps of the shortest runs.")
@click.option(
    "--longest",
    type=click.IntRange(min=1),
    help="Optimiser steps of the longest runs, however long they take.",
)
@click.option("--trials", "most_trials", type=click.IntRange(min=1), help="Trials at most.")
@click.option(
    "--repeats",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    help="Runs of the best settings with other seeds.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the search.")
@click.option("--device", default="auto", show_default=True, help="cuda, cuda:1, cpu, ...")
@click.option(
    "--jobs", type=click.IntRange(min=1), help="Runs to train at once. Default: the number of GPUs, or 1."
)
def tune_command(cache: Place, config_file: Path, folder: Path, budget: str, **options) -> None:
    """Search the settings of a run within a budget of time, and write the best config.

    Trials are trained for a few optimiser steps; the best third of them for three times as many, and so on.
    The first trial is the config itself. The same command continues a tune that was stopped or killed, and
    with a larger --budget one that has ended. Needs optuna.
    """
    from train.experiments.tune.budget import parse_budget
    from train.experiments.tune.run import tune

    tune(cache, config_file, folder, parse_budget(budget), say=click.echo, **options)
