"""Commands that measure a trained draft: `dspark evaluate`, `dspark speculate`, `dspark calibrate`."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pipeline.errors import UsageError, WriteError
from pipeline.options import PLACE, Command
from pipeline.remote.address import Place
from pipeline.target_model.options import TargetOptions, target_options
from train.runs.find import find_run
from train.runs.names import BEST

if TYPE_CHECKING:  # so that --help imports no torch
    from train.runs.figures import Calibration, Evaluation, Speculation

run_option = click.option(
    "--run",
    "--run-dir",  # torchrun takes --run for its own --run-path before Python 3.12.8
    "run",
    type=click.Path(path_type=Path),
    required=True,
    help="A run that has a checkpoint, or one of its checkpoints: RUN/latest, RUN/checkpoints/step-000400.",
)
cache_option = click.option("--cache", type=PLACE, required=True, help="A complete cache, or its URL.")
checkpoint_option = click.option(
    "--checkpoint",
    show_default=BEST,
    help="Checkpoint: best (the latest if nothing was held out), latest, or a name such as step-000400.",
)
device_option = click.option("--device", default="auto", show_default=True, help="cuda, cuda:1, cpu, ...")
json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
anchors_option = click.option(
    "--anchors",
    type=click.IntRange(min=1),
    help="Anchors per held-out sample, drawn by --seed, for large caches. Default: every candidate.",
)
anchors_seed_option = click.option(
    "--seed", type=click.IntRange(0, 2**53), default=0, show_default=True, help="Seed of --anchors."
)


def _keep(folder: Path, figures: Evaluation | Calibration | Speculation) -> None:
    """Put figures beside their draft. Warn if nobody may write there: they were printed.

    Raises:
        WriteError: it failed for another reason, such as a full disk.
    """
    from train.runs.results import save_figures
    from train.runtime.console import warn

    try:
        save_figures(folder, figures)
    except WriteError as error:
        if getattr(error.__cause__, "errno", None) not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        warn(f"the figures are printed only: {error}")


@click.command("evaluate")
@cache_option
@run_option
@checkpoint_option
@anchors_option
@anchors_seed_option
@device_option
@json_option
def evaluate_command(
    cache: Place,
    run: Path,
    checkpoint: str | None,
    anchors: int | None,
    seed: int,
    device: str,
    as_json: bool,
) -> None:
    """Measure a draft on a cache's held-out samples. The target is not needed.

    Prints loss terms, acceptance by position, expected tokens per round (tau) for sampling and for greedy
    decoding, and the calibration of the confidence head, also by source and length. Writes the figures to
    evaluation.json in the checkpoint's folder. Under torchrun, processes share the samples.
    """
    from train.eval.evaluate import evaluate, format_evaluation
    from train.runs.open import open_on_cache
    from train.runs.results import json_values
    from train.runtime.distributed import open_ranks

    found = find_run(run)
    which = found.checkpoint_or(checkpoint)
    with open_ranks(device) as ranks:
        with ranks.together():
            draft = open_on_cache(cache, found.path, ranks, which)
        result = evaluate(
            draft.module,
            draft.reader,
            draft.held_out,
            draft.config,
            ranks,
            step=draft.step,
            anchors=anchors,
            seed=seed,
        )
        if ranks.leads:
            click.echo(json.dumps(json_values(result)) if as_json else format_evaluation(result))
        with ranks.together():
            if ranks.leads:
                _keep(draft.folder, result)


def prompt_options(*, num_prompts: int, max_new_tokens: int) -> Callable[[Command], Command]:
    """Return a decorator that adds the options of prompts and of their texts' length, with these defaults."""
    options = [
        click.option(
            "--prompts",
            type=click.Path(path_type=Path),
            help="JSON Lines as for capture, or .txt with one prompt per line.",
        ),
        click.option(
            "--cache",
            type=PLACE,
            help="Instead of --prompts: a cache or its URL, for its held-out prompts.",
        ),
        click.option(
            "--num-prompts",
            type=click.IntRange(min=1),
            default=num_prompts,
            show_default=True,
            help="Maximum number of prompts.",
        ),
        click.option(
            "--max-new-tokens",
            type=click.IntRange(2, 2**20),
            default=max_new_tokens,
            show_default=True,
            help="Limit of each text.",
        ),
    ]

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def _check_temperatures(_ctx: click.Context, _param: click.Parameter, values: tuple[float, ...]) -> Any:
    """Check `--temperature`. Below 0.001, softmax is greedy but may overflow."""
    for value in values:
        if not (value == 0 or 1e-3 <= value <= 1e3):
            raise UsageError(f"--temperature expects 0, or a number from 0.001 to 1000, got {value}")
    return values


def _check_threshold(_ctx: click.Context, _param: click.Parameter, value: float) -> float:
    """Check `--threshold`."""
    if not 0 <= value <= 1:
        raise UsageError(f"--threshold expects a probability from 0 to 1, got {value}")
    return value


@click.command("speculate")
@target_options(required=True, help="Hugging Face directory or Hub id of the draft's target.")
@run_option
@checkpoint_option
@prompt_options(num_prompts=8, max_new_tokens=128)
@click.option(
    "--temperature",
    "temperatures",
    type=float,
    callback=_check_temperatures,
    multiple=True,
    default=(0.0, 1.0),
    show_default=True,
    help="Sampling temperature; 0 is greedy. Pass it several times to measure several.",
)
@click.option(
    "--threshold",
    type=float,
    callback=_check_threshold,
    default=0.0,
    show_default=True,
    help="Verify a drafted token only if the block is accepted up to it with at least this probability, by "
    "the confidence head (calibrated, if `dspark calibrate` was run). 0 verifies all.",
)
@click.option("--seed", type=click.IntRange(0, 2**53), default=0, show_default=True, help="Seed of sampling.")
@click.option(
    "--measure",
    is_flag=True,
    help="Also time steps over 1 to K drafted tokens on this device, and recommend num_speculative_tokens.",
)
@click.option("--show", is_flag=True, help="Print the texts.")
@json_option
def speculate_command(
    target: TargetOptions,
    run: Path,
    checkpoint: str | None,
    prompts: Path | None,
    cache: Place | None,
    num_prompts: int,
    max_new_tokens: int,
    temperatures: tuple[float, ...],
    threshold: float,
    seed: int,
    measure: bool,
    show: bool,
    as_json: bool,
) -> None:
    """Decode with a draft and its live target, and compare with the target alone.

    Prints the accepted tokens next to those that `dspark evaluate` predicts, the decoding times with and
    without the draft, and whether the greedy text equals the target's own. Writes the figures to
    speculation.json in the checkpoint's folder.
    """
    if (prompts is None) == (cache is None):
        raise UsageError("expected prompts from one place: pass either --prompts FILE or --cache CACHE")
    from pipeline.quiet import quiet_transformers
    from pipeline.target_model.load import open_target
    from train.decode.benchmark import format_speculation, load_pair, speculate_all
    from train.decode.prompts import choose_prompts
    from train.runs.open import open_draft
    from train.runs.results import json_values

    quiet_transformers()
    named = find_run(run)
    draft = open_draft(named.path, named.checkpoint_or(checkpoint))
    found = open_target(target)
    asked = choose_prompts(
        prompts, cache, num_prompts, run=named.path, draft=draft, tokenizer=found.tokenizer()
    )
    pair, folder = load_pair(found, draft), draft.folder
    del draft  # its weights are the pair's by now
    if pair.warning:
        click.echo(f"warning: {pair.warning}", err=True)
    result = speculate_all(
        pair,
        folder,
        asked,
        temperatures=temperatures,
        max_new_tokens=max_new_tokens,
        threshold=threshold,
        seed=seed,
        measure=measure,
        show=partial(click.echo, err=as_json) if show else None,
    )
    click.echo(json.dumps(json_values(result)) if as_json else format_speculation(result))
    _keep(folder, result)


@click.command("calibrate")
@cache_option
@run_option
@checkpoint_option
@anchors_option
@anchors_seed_option
@device_option
@json_option
def calibrate_command(
    cache: Place,
    run: Path,
    checkpoint: str | None,
    anchors: int | None,
    seed: int,
    device: str,
    as_json: bool,
) -> None:
    """Fit a temperature per position, so that confidence predicts how often tokens are accepted.

    Fits sequential temperature scaling on one half of the held-out samples and reports it on the other.
    Writes the temperatures to calibration.json in the checkpoint's folder. `dspark speculate` and `dspark
    export` read them there; SGLang takes them by --speculative-dspark-confidence-sts-path.
    """
    from train.eval.calibrate import calibrate, format_calibration
    from train.runs.open import open_on_cache
    from train.runs.results import json_values
    from train.runtime.distributed import open_ranks

    found = find_run(run)
    which = found.checkpoint_or(checkpoint)
    with open_ranks(device) as ranks:
        with ranks.together():
            draft = open_on_cache(cache, found.path, ranks, which)
        result = calibrate(draft, ranks, anchors=anchors, seed=seed)
        if ranks.leads:
            click.echo(json.dumps(json_values(result)) if as_json else format_calibration(result))
        with ranks.together():
            if ranks.leads:
                _keep(draft.folder, result)
