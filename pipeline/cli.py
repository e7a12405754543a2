"""The `dspark` command: a table of subcommands, each imported when it is called.

To add a command: write a click command in the stage that owns it and add a row to `COMMANDS`.
"""

from __future__ import annotations

import io
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any

import click

from pipeline import __version__
from pipeline.errors import DSparkError, LayerIdWarning
from pipeline.text import one_line, reason

# name: (module and attribute of its click command, summary)
COMMANDS: dict[str, tuple[str, str]] = {
    "plan": ("capture.cli:plan_command", "Show what a capture will do and cost."),
    "capture": ("capture.cli:capture_command", "Run the target once and write a cache."),
    "preview": ("capture.cli:preview_command", "Show samples as the target sees them."),
    "regenerate": ("capture.regenerate.cli:regenerate_command", "Replace answers with the target's own."),
    "train": ("train.cli.train:train_command", "Train a draft from a cache."),
    "sweep": ("train.cli.experiments:sweep_command", "Train a grid of drafts over one cache."),
    "tune": ("train.cli.tune:tune_command", "Search the settings of a run within a budget of time."),
    "compare": ("train.cli.experiments:compare_command", "Show runs side by side."),
    "evaluate": ("train.cli.evaluate:evaluate_command", "Measure a draft on a cache's held-out split."),
    "calibrate": (
        "train.cli.evaluate:calibrate_command",
        "Fit a draft's confidences to observed acceptance.",
    ),
    "speculate": ("train.cli.evaluate:speculate_command", "Decode with a draft and its live target."),
    "schedule": ("train.cli.schedule:schedule_command", "Simulate an engine with many requests."),
    "report": ("train.cli.report:report_command", "Write a page about runs: curves, acceptance, cost."),
    "export": ("train.cli.export:export_command", "Write a draft for vLLM, SGLang or Hugging Face."),
    "import": ("train.cli.export:import_command", "Make a run from a released draft."),
    "prove": ("train.cli.prove:prove_command", "Serve an export with a real engine, and compare its drafts."),
    "inspect": (
        "pipeline.cache.tools.cli:inspect_command",
        "Show the contents of a cache, or the progress of its capture.",
    ),
    "sync": ("pipeline.cache.tools.cli:sync_command", "Copy a cache to or from an object store."),
    "convert": ("pipeline.cache.tools.cli:convert_command", "Re-encode a cache, or drop some of its layers."),
    "verify": (
        "pipeline.cache.tools.cli:verify_command",
        "Check every file of a cache; set damaged ones aside.",
    ),
}


class LazyGroup(click.Group):
    """A click group that reads names and summaries from a table and imports on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        return getattr(import_module(module), attribute)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _layer_warnings_as_lines():
                return super().invoke(ctx)
        except DSparkError as error:
            with suppress(OSError):  # the reader may be gone, as after Ctrl-C on `dspark ... | tee`
                click.echo(f"error: {error}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            with suppress(OSError):
                click.echo("interrupted", err=True)
            ctx.exit(130)
        except BrokenPipeError:
            raise
        except OSError as error:  # disk full, no permission, ...
            place = f"{error.filename}: " if error.filename else ""
            click.echo(f"error: {place}{reason(error)}", err=True)
            ctx.exit(1)
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            click.echo(
                f"error: out of memory ({one_line(error)}): lower capture's --batch-tokens, or "
                "train.batch_tokens and train.anchors_per_batch",
                err=True,
            )
            ctx.exit(1)
        except click.UsageError as error:
            _refuse(ctx, error)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args:
            return super().parse_args(ctx, args)  # the help page
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            _refuse(ctx, error)
            raise


def _refuse(ctx: click.Context, error: click.UsageError) -> None:
    """Report a wrong command line in one line, instead of click's four, and exit."""
    command = error.ctx.command_path if error.ctx else "dspark"
    click.echo(f"error: {error.format_message()} (see `{command} --help`)", err=True)
    ctx.exit(error.exit_code)


@contextmanager
def _layer_warnings_as_lines() -> Iterator[None]:
    """Print each LayerIdWarning in one line, once. Other warnings stay as they are."""
    said: set[str] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("always", LayerIdWarning)
        others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if not issubclass(category, LayerIdWarning):
                others(message, category, *place, **more)
            elif str(message) not in said:
                said.add(str(message))
                click.echo(f"warning: {message}", err=True)

        warnings.showwarning = show
        yield


def _is_out_of_memory(error: Exception) -> bool:
    """Return whether memory ran out, on a GPU or the CPU. Compares names, so that this needs no torch."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or "can't allocate memory" in str(error)


@click.group(
    cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="dspark")
def cli() -> None:
    """Train DSpark speculative-decoding drafts offline: capture once, train many."""


def _replace_what_cannot_be_shown() -> None:
    """Let stdout and stderr write a mark for a character that their encoding lacks, instead of failing.

    Click itself writes UTF-8 where the encoding is ASCII.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


def main(*command: str) -> None:
    """Run the command line; `command` is put before the arguments, as `python -m capture` does."""
    _replace_what_cannot_be_shown()
    try:
        cli([*command, *sys.argv[1:]], prog_name="dspark")
    except BrokenPipeError:  # the reader of the output has ended, as with `dspark ... | head`
        sys.exit(1)


if __name__ == "__main__":
    main()
