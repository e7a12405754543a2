"""A sample as text, with what the loss covers in green."""

from __future__ import annotations

from collections.abc import Callable

import click
import numpy as np


def marked_text(input_ids: np.ndarray, loss_mask: np.ndarray, decode: Callable[[list[int]], str]) -> str:
    """Text of `input_ids` `[S]`, supervised tokens (`loss_mask` `[S]`) in green.

    Runs of one kind are decoded together: a character may be several tokens.
    """
    pieces = []
    for run in np.split(np.arange(len(input_ids)), np.flatnonzero(np.diff(loss_mask)) + 1):
        text = decode(input_ids[run].tolist())
        pieces.append(click.style(text, fg="green") if loss_mask[run[0]] else text)
    return "".join(pieces)
