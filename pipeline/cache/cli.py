"""`dspark verify`."""

from __future__ import annotations

from pathlib import Path

import click
from tqdm import tqdm

from pipeline.errors import CacheError


@click.command("verify")
@click.argument("cache", type=click.Path(path_type=Path))
def verify_command(cache: Path) -> None:
    """Re-hash every file of CACHE against its manifest; exit 1 if any differs."""
    from pipeline.cache import CacheReader

    reader = CacheReader(cache)
    with tqdm(total=reader.manifest.num_bytes, unit="B", unit_scale=True, desc="verify") as progress:
        bad = reader.verify(progress.update)
    for name in bad:
        click.echo(f"damaged: {cache / name}")
    if bad:
        raise CacheError(f"{len(bad)} of {reader.manifest.num_files} files are damaged: capture them again")
    click.echo(f"{cache}: {reader.manifest.num_files} files, {reader.manifest.num_bytes:,} bytes, all good")
