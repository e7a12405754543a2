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
    help="The page to write. One that is there is replaced; a file of another kind is not.",
)
@click.option("--title", help="Of the page. Default: what it is about.")
def report_command(runs: tuple[Path, ...], out: Path, title: str | None) -> None:
    """Write a page about runs: curves, acceptance, calibration, costs.

    One HTML file that needs no other and asks no network, for one run or for several side by side; a RUN
    that is a folder of runs stands for all of them. What nobody measured yet is named on the page,
    with the command that does.
    """
    from train.experiments.report.svg import require_matplotlib

    require_matplotlib()
    if os.path.lexists(out) and not out.is_dir() and out.suffix.lower() not in _SUFFIXES:
        raise UsageError(f"--out {out} is there and is no page: name a new file, or one that ends in .html")
    from pipeline.files import publish_bytes
    from train.experiments.report.data import gather
    from train.experiments.report.page import render

    found = gather(runs)
    size, _ = publish_bytes(out, render(found, title).encode())
    click.echo(f"{out}: {len(found)} run{'s' * (len(found) > 1)}, {size / 1000:,.0f} kB")
