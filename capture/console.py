"""Lines for the terminal: a command's answer on stdout, notes about its progress on stderr."""

from __future__ import annotations

import click


def say(line: str) -> None:
    """Print a line of the answer. Its colours are dropped where stdout is no terminal."""
    click.echo(line)


def note(line: str) -> None:
    """Print a line about the progress to stderr."""
    click.echo(line, err=True)


def bold(text: str) -> str:
    """Return the text in bold."""
    return click.style(text, bold=True)
