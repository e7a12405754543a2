"""`dspark schedule`: an engine with many requests, simulated from held-out figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.remote.address import Place
from train.cli.evaluate import cache_option, checkpoint_option, device_option, json_option, run_option
from train.runs.find import find_run

if TYPE_CHECKING:  # so that --help imports no torch
    from collections.abc import Sequence

    from train.decode.simulation import Drafts
    from train.eval.heldout import Blocks


@click.command("schedule")
@cache_option
@run_option
@checkpoint_option
@click.option(
    "--sps",
    type=click.Path(path_type=Path),
    required=True,
    help="JSON with an engine's steps per second, as SGLang's dspark_sps_profiler or TensorRT-LLM has it.",
)
@click.option(
    "--requests",
    type=click.IntRange(1, 2**14),
    default=16,
    show_default=True,
    help="Requests that are decoded at a time.",
)
@click.option(
    "--steps",
    type=click.IntRange(1, 2**24),
    default=1000,
    show_default=True,
    help="Steps of the engine to simulate.",
)
@click.option(
    "--draft-ms",
    type=click.FloatRange(0, 1e6),
    default=0.0,
    show_default=True,
    help="Milliseconds of drafting per step, if the table was measured without a draft.",
)
@click.option(
    "--seed", type=click.IntRange(0, 2**53), default=0, show_default=True, help="Seed of what is drawn."
)
@device_option
@json_option
def schedule_command(
    cache: Place,
    run: Path,
    checkpoint: str | None,
    sps: Path,
    requests: int,
    steps: int,
    draft_ms: float,
    seed: int,
    device: str,
    as_json: bool,
) -> None:
    """Simulate an engine that decodes many requests, and compare how much of each block to verify.

    Prints the tokens per second of no speculation, of each fixed length, of the paper's Algorithm 1 and of
    TensorRT-LLM's scheduler, from the acceptances and confidences of the held-out samples (calibrated, if
    `dspark calibrate` was run) and the engine's own step times. The target is not needed. Writes nothing.
    """
    from dataclasses import asdict

    from train.data.sampling import drawn_anchors
    from train.decode.simulation import Schedule, best_length, format_schedule, simulate_all
    from train.decode.sps import read_sps
    from train.draft import DRAFTS
    from train.eval.heldout import measure
    from train.runs.open import open_on_cache
    from train.runs.results import read_temperatures
    from train.runtime.distributed import open_ranks

    found = find_run(run)
    table = read_sps(sps)
    with open_ranks(device) as ranks:
        with ranks.together():
            draft = open_on_cache(cache, found.path, ranks, found.checkpoint_or(checkpoint))
            k = DRAFTS[draft.config.draft.kind].slots(draft.module.draft_model.config)
            table.require(requests, requests * (k + 1), sps)
        blocks = measure(
            draft.module,
            draft.reader,
            draft.held_out,
            draft.config,
            ranks,
            drawn_anchors(None, seed),
            "schedule",
        )
        with ranks.together():
            scales = None if blocks.confidence is None else read_temperatures(draft.folder, k)
            policies = simulate_all(
                drafts_of(blocks, scales),
                table,
                requests=requests,
                num_steps=steps,
                draft_seconds=draft_ms / 1000,
                seed=seed,
            )
        result = Schedule(
            step=draft.step,
            samples=len(draft.held_out),
            blocks=len(blocks),
            requests=requests,
            steps=steps,
            seed=seed,
            table=table.form,
            draft_ms=draft_ms,
            calibrated=None if blocks.confidence is None else scales is not None,
            policies=policies,
            num_speculative_tokens=best_length(policies),
        )
        if ranks.leads:
            click.echo(json.dumps(asdict(result)) if as_json else format_schedule(result))


def drafts_of(blocks: Blocks, temperatures: Sequence[float] | None) -> Drafts:
    """Lay held-out blocks out for the simulation.

    Args:
        blocks: of every candidate position.
        temperatures: of the confidence logits, `[K]`.

    Raises:
        ConfigError: there are no blocks.
    """
    import numpy as np

    from pipeline.errors import ConfigError
    from train.decode.simulation import Drafts
    from train.eval.metrics import answers, confidences

    if not len(blocks):
        raise ConfigError("the held-out samples have no two supervised tokens in a row: nothing to decode")
    stretches = answers(blocks)
    left = np.concatenate([np.arange(last - first, 0, -1) for first, last in stretches])
    confidence = None
    if blocks.confidence is not None:
        scales = None if temperatures is None else np.array(temperatures)
        confidence = np.where(blocks.valid, confidences(blocks, scales), 0.0)
    return Drafts(
        accept=np.where(blocks.valid, blocks.accept, 0.0),
        slots=blocks.valid.sum(1),
        left=left,
        starts=np.array([first for first, _ in stretches]),
        confidence=confidence,
    )
