"""`dspark train` and `dspark evaluate`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import click


@click.command("train")
@click.option("--cache", type=click.Path(path_type=Path), required=True, help="A complete cache.")
@click.option(
    "--config", "config_file", type=click.Path(path_type=Path), help="TOML; default: paper settings."
)
@click.option("--run", type=click.Path(path_type=Path), required=True, help="Directory to write.")
@click.option("--set", "overrides", multiple=True, metavar="TABLE.KEY=VALUE", help="Override a setting.")
@click.option("--device", default="auto", show_default=True, help="cuda, cuda:1, cpu, ...")
@click.option("--fresh", is_flag=True, help="Start over if the run exists.")
@click.option(
    "--profile",
    type=click.IntRange(min=1),
    metavar="N",
    help="Write a Chrome trace of N steps to RUN/trace.json (open it in chrome://tracing or Perfetto).",
)
def train_command(
    cache: Path,
    config_file: Path | None,
    run: Path,
    overrides: tuple[str, ...],
    device: str,
    fresh: bool,
    profile: int | None,
) -> None:
    """Train a DSpark draft from a cache; the target is never loaded."""
    from pipeline import config as configuration
    from train.config import RunConfig

    values = configuration.load_toml(config_file) if config_file else {}
    where = str(config_file or "config")
    config = configuration.build(RunConfig, configuration.apply_overrides(values, overrides), where)
    from pipeline.quiet import quiet_transformers
    from train.evaluate import format_evaluation
    from train.loop import train

    quiet_transformers()
    click.echo(configuration.to_toml(config))
    result = train(cache, config, run, device=device, fresh=fresh, profile_steps=profile or 0)
    if result:
        click.echo(format_evaluation(result))
    click.echo(f"draft: {run / 'latest'}")


@click.command("evaluate")
@click.option("--cache", type=click.Path(path_type=Path), required=True, help="A complete cache.")
@click.option("--run", type=click.Path(path_type=Path), required=True, help="A finished run.")
@click.option("--device", default="auto", show_default=True, help="cuda, cuda:1, cpu, ...")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def evaluate_command(cache: Path, run: Path, device: str, as_json: bool) -> None:
    """Measure a draft on a cache's held-out samples: loss terms, acceptance by position, tau."""
    from pipeline.cache import CacheReader
    from pipeline.device import resolve_device
    from train.checkpoint import load_checkpoint
    from train.evaluate import evaluate, format_evaluation, split
    from train.loop import load_run_config, prepare, trainer_module

    config = load_run_config(run)
    place = resolve_device(device)
    if place.type != "cuda":  # where it was trained may not be here
        config = replace(config, draft=replace(config.draft, attention="auto"))
    reader = CacheReader(cache)
    reader.check_shards()
    model, state = load_checkpoint(run, reader)
    reader.require_layers(model.config.target_layer_ids)
    _, test_samples = split(reader, config.train.held_out)
    module = trainer_module(model.to(place), config)
    prepare(module, config, place)
    result = evaluate(module, reader, test_samples, config, place)
    result = {"step": state["step"], **result}
    click.echo(json.dumps(result) if as_json else format_evaluation(result))
