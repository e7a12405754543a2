"""Commands that look at a trained draft: `dspark evaluate`."""

from __future__ import annotations

import json
from pathlib import Path

import click

run_option = click.option(
    *("--run", "--run-dir", "run"),  # torchrun takes --run for its own --run-path before Python 3.12.8
    type=click.Path(path_type=Path),
    required=True,
    help="A run with a checkpoint.",
)
cache_option = click.option(
    "--cache", type=click.Path(path_type=Path), required=True, help="A complete cache."
)
checkpoint_option = click.option(
    "--checkpoint",
    default="best",
    show_default=True,
    help="Which one: best (the latest where nothing was held out), latest, or as step-000400.",
)
device_option = click.option("--device", default="auto", show_default=True, help="cuda, cuda:1, cpu, ...")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")


@click.command("evaluate")
@cache_option
@run_option
@checkpoint_option
@click.option(
    "--anchors",
    type=click.IntRange(min=1),
    help="Anchors of a held-out sample, drawn by --seed. Default: every candidate position.",
)
@click.option("--seed", default=0, show_default=True, help="Of --anchors.")
@device_option
@json_option
def evaluate_command(
    cache: Path, run: Path, checkpoint: str, anchors: int | None, seed: int, device: str, as_json: bool
) -> None:
    """Measure a draft on a cache's held-out samples; no target is needed.

    Loss terms, acceptance by position, expected tokens a round (tau) when sampling and when greedy, the
    calibration of the confidence head, all by source and length. The figures are also written to
    evaluation.json in the checkpoint's folder. Under torchrun processes share the samples.
    """
    from train.distributed import open_ranks
    from train.evaluate import EVALUATION, evaluate, format_evaluation, save_figures
    from train.opened import open_draft

    with open_ranks(device) as ranks:
        with ranks.together():
            draft = open_draft(cache, run, ranks, checkpoint)
        result = {"step": draft.step}
        result |= evaluate(
            draft.module, draft.reader, draft.held_out, draft.config, ranks, anchors=anchors, seed=seed
        )
        if ranks.leads:
            click.echo(json.dumps(result) if as_json else format_evaluation(result))
        with ranks.together():
            if ranks.leads:
                save_figures(draft.folder, EVALUATION, result)
