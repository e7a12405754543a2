"""What a run shows: a bar on a terminal, plain lines in a pipe or a file, one process of many."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

import click
from tqdm import tqdm

from train.runtime.distributed import Ranks


def say(text: str, *, err: bool = True) -> None:
    """Print a line. That nobody listens any more ends no run.

    Args:
        err: on stderr, where progress goes; else on stdout.
    """
    with suppress(OSError):
        click.echo(text, err=err)


def warn(text: str) -> None:
    """Print a warning on stderr."""
    say(f"warning: {text}")


def bar(items: Any, ranks: Ranks, **options: Any) -> tqdm:
    """A progress bar, where there is somebody to look at it."""
    return tqdm(items, disable=not (ranks.leads and sys.stderr.isatty()), **options)


class Display:
    """Says how training goes, on stderr. That nobody listens any more ends no run.

    Args:
        ranks: the first of them speaks.
        total: optimiser steps of the run.
        step: those done before.
    """

    def __init__(self, ranks: Ranks, total: int, step: int):
        self._speaks, self._total = ranks.leads, total
        self._bar = bar(None, ranks, total=total, initial=step, unit="step", desc="train")

    def stepped(self) -> None:
        """A step was done."""
        with suppress(OSError):
            self._bar.update()

    def figures(self, line: dict[str, Any]) -> None:
        """Show a log line's main figures."""
        wanted = {"loss": ".3f", "tau": ".3f", "lr": ".2e", "tokens_per_s": ".0f", "data_wait_percent": ".0f"}
        shown = {key: f"{line[key]:{form}}" for key, form in wanted.items() if line[key] is not None}
        names = {"tokens_per_s": "tok_s", "data_wait_percent": "wait%"}
        shown = {names.get(key, key): text for key, text in shown.items()}
        if line["skipped_steps"]:
            shown["skipped"] = str(line["skipped_steps"])
        if self._bar.disable:
            self.say(f"step {line['step']}/{self._total}: " + ", ".join(f"{k} {v}" for k, v in shown.items()))
        else:
            with suppress(OSError):
                self._bar.set_postfix(shown)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._speaks:
            with suppress(OSError), tqdm.external_write_mode(file=sys.stderr):
                click.echo(text, err=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        with suppress(OSError):
            self._bar.close()
