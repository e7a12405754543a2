"""Options of answers that a capture lets its target give; importing this imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import click

from pipeline.errors import UsageError
from pipeline.options import gathered


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """The target's own answers in place of the data's, and how they are sampled."""

    regenerate: bool = False
    max_new_tokens: int = 512
    temperature: float = 0.7
    """0 is greedy."""
    top_k: int = 50
    """0 is off."""
    top_p: float = 1.0
    answer_seed: int = 0

    def settings(self) -> str:
        """Return what decides the answers, for the manifest."""
        return (
            f"max_new_tokens={self.max_new_tokens} temperature={self.temperature} top_k={self.top_k} "
            f"top_p={self.top_p} seed={self.answer_seed}"
        )

    def check(self, mask_reasoning: bool, given: set[str]) -> None:
        """Refuse options without effect. Raises UsageError.

        Args:
            given: names of the parameters that the user gave.
        """
        names = {"max_new_tokens", "temperature", "top_k", "top_p", "answer_seed"} & given
        if names and not self.regenerate:
            option = f"--{min(names).replace('_', '-')}"
            raise UsageError(f"{option} is for answers that --regenerate samples: give both, or drop it")
        if self.regenerate and mask_reasoning:
            raise UsageError(
                "--mask-reasoning tells an old answer's reasoning from its text, and --regenerate replaces "
                "both: use dspark regenerate first, then capture its file"
            )

    def sampling(self, tokens: int, seed: int) -> dict[str, Any]:
        """Return a request's settings for the engine.

        Args:
            tokens: maximum tokens of the answer.
            seed: the request's own.
        """
        return {
            "max_new_tokens": tokens,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "seed": seed,
        }


answer_options = gathered(
    AnswerOptions,
    "answers",
    [
        click.option(
            "--regenerate",
            is_flag=True,
            help="Let the target answer every supervised turn itself; with vLLM, in the pass that captures.",
        ),
        click.option(
            "--max-new-tokens",
            type=click.IntRange(min=1),
            default=512,
            show_default=True,
            help="With --regenerate: maximum tokens per answer.",
        ),
        click.option(
            "--temperature",
            type=click.FloatRange(min=0),
            default=0.7,
            show_default=True,
            help="With --regenerate: sampling temperature; 0 is greedy.",
        ),
        click.option(
            "--top-k",
            type=click.IntRange(min=0),
            default=50,
            show_default=True,
            help="With --regenerate: sample from the k likeliest tokens. 0: no limit.",
        ),
        click.option(
            "--top-p",
            type=click.FloatRange(0, 1, min_open=True),
            default=1.0,
            show_default=True,
            help="With --regenerate: sample from the likeliest tokens whose probabilities sum to p.",
        ),
        click.option(
            "--answer-seed", default=0, show_default=True, help="With --regenerate: seed of the sampling."
        ),
    ],
)
"""Add the options of `AnswerOptions` to a click command, which receives them as `answers`."""
