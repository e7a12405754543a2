"""`dspark prove`."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import click

from pipeline.errors import UsageError
from pipeline.remote.address import Place
from pipeline.target_model.options import TargetOptions, target_options
from train.cli.evaluate import checkpoint_option, json_option, prompt_options, run_option
from train.runs.find import find_run


@click.command("prove")
@click.argument("folder", metavar="EXPORT", type=click.Path(path_type=Path))
@run_option
@checkpoint_option
@click.option(
    "--engine", type=click.Choice(["vllm", "llama.cpp"]), required=True, help="Engine that serves EXPORT."
)
@click.option(
    "--engine-path",
    type=click.Path(path_type=Path),
    help="Of vLLM its virtual environment, of llama.cpp a built checkout. [default: those of `make engines`]",
)
@target_options(required=True, help="Hugging Face directory or Hub id of the draft's target.")
@prompt_options(num_prompts=20, max_new_tokens=64)
@json_option
def prove_command(
    folder: Path,
    run: Path,
    checkpoint: str | None,
    engine: str,
    engine_path: Path | None,
    target: TargetOptions,
    prompts: Path | None,
    cache: Place | None,
    num_prompts: int,
    max_new_tokens: int,
    as_json: bool,
) -> None:
    """Serve EXPORT with a real engine, and compare every drafted token with those of RUN's draft.

    The engine decodes prompts greedily with and without the draft. Then the draft of RUN drafts here, after
    the engine's own text. --dtype is float32 unless given. In float32 the exit code is 1 if a drafted token
    or a text differs, and the first is named. In other dtypes rounding may choose other tokens, and only
    figures are printed. The engine listens on 127.0.0.1 only, if at all, and ends with this command.
    """
    if (prompts is None) == (cache is None):
        raise UsageError("expected prompts from one place: pass either --prompts FILE or --cache CACHE")
    from pipeline.quiet import quiet_transformers
    from pipeline.target_model.load import open_target
    from train.decode.prompts import choose_prompts
    from train.prove.compare import check, format_proof
    from train.prove.run import as_exported, ended_whole, open_engine, prove, work_folder
    from train.runs.open import open_draft
    from train.runtime.console import say

    quiet_transformers()
    named = find_run(run)
    draft = open_draft(named.path, named.checkpoint_or(checkpoint))
    found = open_target(replace(target, dtype="float32") if target.dtype == "auto" else target)
    asked = choose_prompts(
        prompts, cache, num_prompts, run=named.path, draft=draft, tokenizer=found.tokenizer()
    )
    draft = as_exported(folder, draft)
    with ended_whole(), work_folder() as work:
        served = open_engine(engine, engine_path, found, draft, work)
        proof = prove(served, folder, draft, found, asked, max_new_tokens, say)
    click.echo(json.dumps({**asdict(proof), "holds": proof.holds}) if as_json else format_proof(proof))
    check(proof)
