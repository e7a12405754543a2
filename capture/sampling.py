"""Sampling of answers by the target, and its options; importing this imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import click


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of the sampling."""

    max_new_tokens: int = 512
    temperature: float = 0.7
    """0 is greedy."""
    top_k: int = 50
    """0 is off."""
    top_p: float = 1.0
    seed: int = 0


def sampling_options(seed: str = "--seed", when: str = "") -> list[Callable]:
    """Return click options for the fields of `Sampling`.

    Args:
        seed: name of the option for the seed.
        when: words before each help, for a command that samples only then.
    """
    return [
        click.option(
            "--max-new-tokens",
            type=click.IntRange(min=1),
            default=Sampling.max_new_tokens,
            show_default=True,
            help=f"{when}Maximum tokens per answer.",
        ),
        click.option(
            "--temperature",
            type=click.FloatRange(min=0),
            default=Sampling.temperature,
            show_default=True,
            help=f"{when}Sampling temperature; 0 is greedy.",
        ),
        click.option(
            "--top-k",
            type=click.IntRange(min=0),
            default=Sampling.top_k,
            show_default=True,
            help=f"{when}Sample from the k likeliest tokens. 0: no limit.",
        ),
        click.option(
            "--top-p",
            type=click.FloatRange(0, 1, min_open=True),
            default=Sampling.top_p,
            show_default=True,
            help=f"{when}Sample from the likeliest tokens whose probabilities sum to p.",
        ),
        click.option(seed, default=Sampling.seed, show_default=True, help=f"{when}Seed of the sampling."),
    ]
