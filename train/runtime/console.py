"""Console output of a run: a progress bar on a terminal, else plain lines. Only the first rank writes."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

import click
from tqdm import tqdm

from train.runtime.distributed import Ranks


def say(text: str, *, err: bool = True) -> None:
    """Print a line. Ignore a closed pipe, so that the run continues without its reader.

    Args:
        err: print to stderr, where progress goes, instead of stdout.
    """
    with suppress(OSError):
        click.echo(text, err=err)


def warn(text: str) -> None:
    """Print a warning on stderr."""
    say(f"warning: {text}")


def bar(items: Any, ranks: Ranks, **options: Any) -> tqdm:
    """Return a progress bar, which shows only on the first rank and on a terminal."""
    return tqdm(items, disable=not (ranks.leads and sys.stderr.isatty()), **options)


class Display:
    """Show training progress on stderr. A closed stderr does not stop the run.

    Args:
        ranks: all ranks; only the first one prints.
        total: optimiser steps of the run.
        step: optimiser steps done before.
    """

    def __init__(self, ranks: Ranks, total: int, step: int):
        self._speaks, self._total = ranks.leads, total
        self._bar = bar(None, ranks, total=total, initial=step, unit="step", desc="train")

    def stepped(self) -> None:
        """Advance the bar by one optimiser step."""
        with suppress(OSError):
            self._bar.update()

    def figures(self, line: dict[str, Any]) -> None:
        """Show the main figures of a log line."""
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
        """Print a line above the bar."""
        if self._speaks:
            with suppress(OSError), tqdm.external_write_mode(file=sys.stderr):
                click.echo(text, err=True)

    def close(self) -> None:
        """Close the bar and leave it on the screen."""
        with suppress(OSError):
            self._bar.close()
