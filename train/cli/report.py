"""`dspark report`."""

from __future__ import annotations

import os
from pathlib import Path

import click

from pipeline.errors import UsageError

_SUFFIXES = (".html", ".htm")


@click.command("report")
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default="report.html",
    show_default=True,
    help="HTML file to write. An existing .html file is replaced, any other file is not.",
)
@click.option("--title", help="Title of the report. Default: made from the runs.")
def report_command(runs: tuple[Path, ...], out: Path, title: str | None) -> None:
    """Write a report about runs: curves, acceptance, calibration, costs.

    The report is one HTML file without other files or network access, for one run or several side by side.
    A RUN that is a folder of runs stands for all of them. The report names missing measurements, with the
    commands to run.
    """
    from train.experiments.report.svg import require_matplotlib

    require_matplotlib()
    if os.path.lexists(out) and not out.is_dir() and out.suffix.lower() not in _SUFFIXES:
        raise UsageError(
            f"--out {out} exists and is not an .html file: pass a new file, or one ending in .html"
        )
    from pipeline.files import publish_bytes
    from train.experiments.report.data import gather
    from train.experiments.report.page import render

    found = gather(runs)
    size, _ = publish_bytes(out, render(found, title).encode())
    click.echo(f"{out}: {len(found)} run{'s' * (len(found) > 1)}, {size / 1000:,.0f} kB")
