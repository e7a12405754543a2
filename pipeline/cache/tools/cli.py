"""`dspark verify`, `dspark inspect`, `dspark convert` and `dspark sync`."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING

import click

from pipeline.cache.features import LABELS, hidden_words
from pipeline.cache.split import HELD_OUT
from pipeline.errors import CacheError, UsageError
from pipeline.options import (
    CONTEXT_CODECS,
    HIDDEN_CHOICES,
    LAST_CODECS,
    LAST_HIDDEN_CHOICES,
    PLACE,
    parse_layer_ids,
)
from pipeline.remote.address import Address, Place

if TYPE_CHECKING:
    from pipeline.cache.tools.convert import Converted

_CACHE = click.argument("cache", type=PLACE)


@click.command("verify")
@_CACHE
@click.option("--fast", is_flag=True, help="Check sizes, headers and the index only; read no states.")
@click.option("--repair", is_flag=True, help="Set damaged files aside, for the next capture to rewrite.")
@click.option(
    "--threads", type=click.IntRange(min=1), help="Files read at once. Default: the cores, up to 8."
)
def verify_command(cache: Place, fast: bool, repair: bool, threads: int | None) -> None:
    """Check every file of CACHE against its manifest; exit 1 if any is damaged.

    Hashes every file, and compares the samples' tokens with their ids. In an incomplete cache, checks the
    finished shards. With --repair, moves damaged files to CACHE/damaged; the same capture command then
    rewrites only those. In an object store a shard at a time is fetched.
    """
    from tqdm import tqdm

    from pipeline.cache.verify import DAMAGED, set_aside, verify_cache

    with tqdm(unit="B", unit_scale=True, desc="verify") as bar:
        if isinstance(cache, Address):
            from pipeline.cache.remote.verify import verify_remote

            if repair:
                raise UsageError(f"--repair moves files of a directory: copy {cache} again by `dspark sync`")
            found = verify_remote(cache, fast=fast, begin=bar.reset, progress=bar.update)
        else:
            found = verify_cache(cache, fast=fast, threads=threads, begin=bar.reset, progress=bar.update)
    for problem in found.problems:
        click.echo(f"damaged: {cache}/{problem.file}: {problem.reason}")
    state = f"{cache}: "
    if not found.complete:
        state += f"incomplete, {found.shards:,} shards finished, {found.pending:,} still to be captured; "
    if not found.problems:
        how = "sizes and structure" if fast else "all"
        rows = f"; last hidden states{hidden_words(found.hidden)}" * (found.hidden != LABELS)
        click.echo(f"{state}{found.files:,} files, {found.bytes:,} bytes, {how} good{rows}")
        return
    if not found.complete:
        click.echo(state.removesuffix("; "))
    count = f"{cache}: {len(found.problems):,} of {found.files:,} files are damaged or missing"
    if isinstance(cache, Address):
        raise CacheError(f"{count}: remove these objects and copy the cache there again by `dspark sync`")
    if not repair:
        raise CacheError(f"{count}: `dspark verify {cache} --repair` sets them aside for capture to rewrite")
    moved = set_aside(cache, found.problems)
    raise CacheError(
        f"{count}, {len(moved):,} set aside in {cache / DAMAGED}: run the command that wrote it again, with "
        "the same options, to rewrite only those"
    )


@click.command("inspect")
@_CACHE
@click.option(
    "--sample",
    metavar="ID",
    help="Show this sample: its hash, the first digits of it, or '#N', counted from 0.",
)
@click.option(
    "--held-out",
    type=click.FloatRange(0, 1),
    default=HELD_OUT,
    show_default=True,
    help="Fraction of the samples that a run would hold out.",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON object.")
def inspect_command(cache: Place, sample: str | None, held_out: float, as_json: bool) -> None:
    """Show the contents of CACHE, or the progress of its capture.

    With --sample: the sample's text, supervised tokens in green, and figures of its states, a line per layer.
    Only reads, from any machine that sees the directory.
    """
    from pipeline.cache.tools.inspect import cache_facts, fact_lines

    if sample is None:
        facts = cache_facts(cache, fraction=held_out)
        lines = fact_lines(facts)
    else:
        from pipeline.cache.reader import CacheReader
        from pipeline.cache.tools.sample import cached_decoder, find_sample, sample_facts, sample_lines

        reader = CacheReader(cache)
        reader = CacheReader(cache, hidden=reader.manifest.identity.features.hidden)
        number = find_sample(reader, sample)
        reader.alone([number])
        shown = sample_facts(reader, number)
        decode = cached_decoder(reader.path)
        lines = sample_lines(shown, decode)
        if as_json:
            shown["text"] = decode(shown["input_ids"]) if decode else None
            facts = cache_facts(cache, fraction=held_out) | {"sample": shown}
    if as_json:
        click.echo(json.dumps(facts, indent=1))
        return
    for line in lines:
        click.echo(line)  # click strips the colours if the output is not a terminal


@click.command("convert")
@click.argument("source", metavar="SRC", type=PLACE)
@click.argument("destination", metavar="DST", type=PLACE)
@click.option(
    "--context-codec",
    type=click.Choice(CONTEXT_CODECS),
    help="Codec of context features. Default: as in SRC.",
)
@click.option(
    "--last-codec",
    type=click.Choice(LAST_CODECS),
    help="Codec of last hidden states, which the teacher's logits come from. Default: as in SRC.",
)
@click.option(
    "--last-hidden",
    type=click.Choice(LAST_HIDDEN_CHOICES),
    help="none: leave the last hidden states out. Default: as in SRC.",
)
@click.option(
    "--hidden",
    type=click.Choice(HIDDEN_CHOICES),
    help="labels: keep the last hidden states of label rows only. Default: as in SRC.",
)
@click.option(
    "--layers", callback=parse_layer_ids, help="Layer ids to keep, as 1,9,17. Default: all of SRC's."
)
@click.option("--force", is_flag=True, help="Start even if the disk can't hold the cache.")
def convert_command(
    source: Place,
    destination: Place,
    context_codec: str | None,
    last_codec: str | None,
    last_hidden: str | None,
    hidden: str | None,
    layers: tuple[int, ...] | None,
    force: bool,
) -> None:
    """Write the cache DST from the cache SRC, with other codecs or fewer states. Needs no target.

    Copies states exactly if their codec stays. Only reads SRC, and hashes every file of it before use. After
    a stop at any moment, the same command continues; several at once share the work. Either is a directory,
    or s3://, gs:// or az://BUCKET/FOLDER.
    """
    from pipeline.cache.tools.convert import convert

    converted = convert(
        source,
        destination,
        context_codec=context_codec,
        last_codec=last_codec,
        last_hidden=last_hidden,
        hidden=hidden,
        layer_ids=layers,
        force=force,
    )
    _say_converted(source, destination, converted)


def _say_converted(source: Place, destination: Place, converted: Converted) -> None:
    from pipeline.cache.tools.inspect import summary_lines

    if not converted.complete:
        click.echo(
            f"cache {destination}: shards written by this process: {converted.shards}; "
            "other processes write the rest"
        )
        return
    click.echo(f"cache {destination}: {'already complete' if converted.reused else 'complete'}")
    for line in summary_lines(converted.manifest):
        click.echo(line)
    variation = converted.manifest.fidelity.get("teacher_tv_mean", math.nan)
    teacher = f"; teacher total variation {variation:.4f} against its states"
    stored = converted.manifest.identity.features.has_last_hidden
    click.echo(f"  converted from {source}{teacher * stored}")


@click.command("sync")
@click.argument("source", metavar="SRC", type=PLACE)
@click.argument("destination", metavar="DST", type=PLACE)
@click.option(
    "--layers", callback=parse_layer_ids, help="Copy these layers only, as 1,9,17, like `dspark convert`."
)
def sync_command(source: Place, destination: Place, layers: tuple[int, ...] | None) -> None:
    """Copy the cache SRC to DST. Either is a directory, or s3://, gs:// or az://BUCKET/FOLDER.

    Compares every file with its hash. After a stop at any moment, the same command continues.
    """
    if layers is not None:  # another cache, whose manifest says where it comes from
        from pipeline.cache.tools.convert import convert

        _say_converted(source, destination, convert(source, destination, layer_ids=layers))
        return
    from tqdm import tqdm

    from pipeline.cache.remote.sync import sync
    from pipeline.cache.tools.inspect import summary_lines
    from pipeline.text import size

    with tqdm(unit="B", unit_scale=True, desc="sync") as bar:
        manifest, copied = sync(source, destination, bar.reset, bar.update)
    done = f"complete, {size(copied)} copied" if copied else "already complete"
    click.echo(f"cache {destination}: {done}")
    for line in summary_lines(manifest):
        click.echo(line)
