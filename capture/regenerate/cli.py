"""`dspark regenerate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from capture.options import ReadingOptions, reading_options, target_or_example_options
from capture.sampling import Sampling, sampling_options
from pipeline.errors import DataError, DSparkError, UsageError
from pipeline.options import gathered
from pipeline.target_model.options import TargetOptions

if TYPE_CHECKING:  # so that --help imports no torch
    from capture.regenerate.dialogue import Dialogue
    from capture.regenerate.engine import Outcome

_AT_LEAST_0, _AT_LEAST_1 = click.IntRange(min=0), click.IntRange(min=1)

# Options of one engine only; --target names the model of either.
_IN_PROCESS = (
    "batch_size",
    "revision",
    "trust_remote_code",
    "attn_implementation",
    "dtype",
    "gguf_file",
    "device",
    "device_map",
    "chat_template",
)
_ENDPOINT = ("model", "concurrency", "retries", "timeout")


_sampling = gathered(Sampling, "sampling", sampling_options())


@click.command("regenerate")
@target_or_example_options
@reading_options
@click.option("--out", type=click.Path(path_type=Path), required=True, help="JSONL to write, in input order.")
@click.option("--fresh", is_flag=True, help="Start over: discard the progress, replace the output.")
@_sampling
@click.option(
    "--batch-size", type=_AT_LEAST_1, default=64, show_default=True, help="Conversations per batch."
)
@click.option(
    "--endpoint",
    metavar="URL",
    help="Send requests to a server with OpenAI's chat completions API (vllm serve, SGLang, ...) instead of "
    "loading the target. Its key, if needed, is read from OPENAI_API_KEY. It is sent no --top-k 0.",
)
@click.option("--model", help="Served name of the target.  [default: --target, or the only model served]")
@click.option(
    "--concurrency",
    type=click.IntRange(1, 1000),
    default=32,
    show_default=True,
    help="Concurrent requests to the endpoint.",
)
@click.option(
    "--retries",
    type=_AT_LEAST_0,
    default=6,
    show_default=True,
    help="Retries after a 429 or 5xx, a timeout or a dropped connection.",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True),
    default=600.0,
    show_default=True,
    help="Maximum seconds per answer of the endpoint.",
)
@click.pass_context
def regenerate_command(
    ctx: click.Context,
    target: TargetOptions,
    reading: ReadingOptions,
    out: Path,
    fresh: bool,
    batch_size: int,
    endpoint: str | None,
    model: str | None,
    concurrency: int,
    retries: int,
    timeout: float,
    sampling: Sampling,
) -> None:
    """Replace every assistant turn by the target's own answer, turn by turn.

    Each answer is conditioned on the regenerated answers before it. System prompts, tools, tool messages,
    turns that call tools, and a row's other keys stay unchanged. An answer that reaches --max-new-tokens is
    cut after its last sentence. Rows without a turn to answer are kept as they are, and counted apart.

    If the command is stopped, run it again (without --fresh) to continue: OUT.progress keeps the answers
    until all rows are answered. Endpoint, batch size and concurrency may then differ; another target,
    sampling or data is refused.

    Rows that can't be answered are listed with the reason in OUT.failed.jsonl, all others are written, and
    the command fails. The same command then retries only the failed rows.
    """
    _check_engine_options(ctx, endpoint)
    from capture.regenerate.dialogue import rows_hash
    from capture.regenerate.engine import Engine
    from capture.regenerate.progress import progress_path
    from capture.regenerate.reading import read_dialogues
    from capture.regenerate.run import check_output, regenerate_file

    check_output(out, reading.data, fresh=fresh)
    template_arguments, template = reading.template_arguments(), reading.template_text()
    dialogues = read_dialogues(reading)
    engine: Engine
    if endpoint is None:
        from capture.regenerate.huggingface import load_engine

        engine, identity = load_engine(
            target,
            sampling,
            batch_size=batch_size,
            template=template,
            template_arguments=template_arguments,
        )
    else:
        from capture.regenerate.endpoint import EndpointEngine

        engine = EndpointEngine(
            endpoint,
            sampling,
            model=model or target.target,
            concurrency=concurrency,
            retries=retries,
            timeout_s=timeout,
            template_arguments=template_arguments,
        )
        identity = {"engine": "endpoint", "model": engine.model}
    run = {
        **identity,
        "data": rows_hash(dialogues),
        "template arguments": template_arguments,
        **asdict(sampling),
    }
    try:
        failures = regenerate_file(dialogues, engine, out, run, fresh=fresh)
    except KeyboardInterrupt:
        raise DSparkError(
            f"interrupted: the answers so far are in {progress_path(out)}; run this again "
            "(without --fresh) to continue"
        ) from None
    _report(out, dialogues, failures)


def _report(out: Path, dialogues: Sequence[Dialogue], failures: Sequence[Outcome]) -> None:
    """Print the counts of rows. Raises DataError if some failed."""
    from capture.regenerate.run import failed_path

    kept = sum(not dialogue.turns for dialogue in dialogues)
    answered = len(dialogues) - len(failures) - kept
    click.echo(f"{out}: {answered:,} conversations with the target's own answers")
    if kept:
        click.echo(f"{out}: {kept:,} rows kept as they were: no assistant turn to answer")
    if failures:
        first = failures[0]
        raise DataError(
            f"{len(failures):,} of {len(dialogues):,} rows failed, the first at {first.dialogue.where}: "
            f"{first.failure}; {failed_path(out)} lists them; run this again (without --fresh) to retry them"
        )


def _check_engine_options(ctx: click.Context, endpoint: str | None) -> None:
    """Raise UsageError for an option that would have no effect."""
    given = [name for name in ctx.params if ctx.get_parameter_source(name) == ParameterSource.COMMANDLINE]
    for name in given:
        option = "--" + name.replace("_", "-")
        if endpoint is None and name in _ENDPOINT:
            raise UsageError(f"{option} needs --endpoint: give both, or drop it")
        if endpoint is not None and name in _IN_PROCESS:
            raise UsageError(f"{option} has no effect on an endpoint: set it when starting the server")
