"""`dspark export` and `dspark import`."""

from __future__ import annotations

from pathlib import Path

import click
from click import format_filename

from pipeline.errors import UsageError
from pipeline.options import PLACE
from pipeline.remote.address import Place
from train.cli.evaluate import cache_option, checkpoint_option
from train.runs.find import find_run


@click.command("export")
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--to",
    type=click.Choice(["hf", "vllm", "sglang", "llama.cpp", "tensorrt-llm", "speculators"]),
    required=True,
    help="Reader of the export. hf takes every draft; the others refuse drafts that they can't serve.",
)
@checkpoint_option
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    default="bfloat16",
    show_default=True,
    help="Dtype of the weights.",
)
@click.option(
    "--with-embeddings",
    is_flag=True,
    help="Include the target's embedding and head. Engines use the target's own; SGLang ignores these.",
)
@click.option("--cache", type=PLACE, help="A cache of the draft's target, for --with-embeddings.")
@click.option(
    "--gguf",
    "file_type",
    type=click.Choice(["f32", "f16", "bf16", "q8_0"]),
    help="For --to llama.cpp: also write draft-TYPE.gguf, with matrices of this type.",
)
@click.option(
    "--target-gguf",
    type=click.Path(path_type=Path),
    help="The target's own GGUF file, for --gguf: the draft's file gets its tokenizer.",
)
def export_command(
    run: Path,
    folder: Path,
    to: str,
    checkpoint: str | None,
    dtype: str,
    with_embeddings: bool,
    cache: Place | None,
    file_type: str | None,
    target_gguf: Path | None,
) -> None:
    """Write RUN's draft to the new directory DIR, in the layout that inference engines load.

    Writes config.json, model.safetensors, a model card, and the confidence head's temperatures if `dspark
    calibrate` was run. Leaves out the embedding and head, which are the target's, unless asked for them.
    """
    if with_embeddings and cache is None:
        raise UsageError(
            "--with-embeddings needs --cache, which holds the target's embedding and head: pass both"
        )
    if cache is not None and not with_embeddings:
        raise UsageError("--cache is read only for --with-embeddings: pass both, or neither")
    if file_type is not None and to != "llama.cpp":
        raise UsageError(f"--gguf is of llama.cpp, --to is {to}: pass --to llama.cpp, or leave --gguf out")
    if (file_type is None) != (target_gguf is None):
        raise UsageError(
            "--gguf and --target-gguf go together: pass a type and the target's own GGUF file, or neither"
        )
    from pipeline.quiet import quiet_transformers
    from train.export.writer import GgufFile, export

    quiet_transformers()
    found = find_run(run)
    draft = export(
        found.path,
        folder,
        to,
        checkpoint=found.checkpoint_or(checkpoint),
        dtype=dtype,
        cache=cache,
        gguf=GgufFile(file_type, target_gguf) if file_type and target_gguf else None,
    )
    click.echo(
        f"{format_filename(folder)}: the draft of {format_filename(run)} at step {draft.step:,} for "
        f"{draft.target.name}, {dtype}; to serve it see {format_filename(folder / 'README.md')}"
    )


@click.command("import")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@cache_option
@click.option(
    "--run",
    "--run-dir",
    "run",
    type=click.Path(path_type=Path),
    required=True,
    help="Directory to write; new or empty.",
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="TABLE.KEY=VALUE",
    help="Set a setting of [loss] or [train] for measuring the draft, such as train.held_out.",
)
def import_command(folder: Path, cache: Place, run: Path, overrides: tuple[str, ...]) -> None:
    """Make a run of a released draft, in DeepSpec's layout or in that of the speculators library.

    DIR has config.json and safetensors weights.

    The run has one checkpoint, at step 0, and is complete. `dspark evaluate`, `compare` and `export` take it
    like any other run, and another run can start from it with draft.init_from. The embedding and head come
    from the cache, which must be of the draft's target and hold the layers that the draft reads.
    """
    from pipeline.quiet import quiet_transformers
    from train.export.deepspec import import_draft

    quiet_transformers()
    config, slots = import_draft(folder, cache, run, overrides)
    click.echo(
        f"{format_filename(run)}: the draft of {format_filename(folder)}, reads layers "
        f"{list(config.target_layer_ids)}, drafts {slots} tokens a round"
    )
