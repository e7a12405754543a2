"""Options of answers that a capture lets its target give; importing this imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

import click

from capture.sampling import Sampling, sampling_options
from pipeline.errors import UsageError
from pipeline.options import gathered

_SAMPLING = ("max_new_tokens", "temperature", "top_k", "top_p", "answer_seed")


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """The target's own answers in place of the data's, and how they are sampled: see `Sampling`."""

    regenerate: bool = False
    max_new_tokens: int = Sampling.max_new_tokens
    temperature: float = Sampling.temperature
    top_k: int = Sampling.top_k
    top_p: float = Sampling.top_p
    answer_seed: int = Sampling.seed

    @property
    def sampling(self) -> Sampling:
        """The settings of the sampling."""
        return Sampling(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.answer_seed,
        )

    def settings(self) -> str:
        """Return what decides the answers, for the manifest."""
        return " ".join(f"{name}={value}" for name, value in vars(self.sampling).items())

    def check(self, mask_reasoning: bool, given: set[str]) -> None:
        """Refuse options without effect. Raises UsageError.

        Args:
            given: names of the parameters that the user gave.
        """
        names = given.intersection(_SAMPLING)
        if names and not self.regenerate:
            option = f"--{min(names).replace('_', '-')}"
            raise UsageError(f"{option} is for answers that --regenerate samples: give both, or drop it")
        if self.regenerate and mask_reasoning:
            raise UsageError(
                "--mask-reasoning tells an old answer's reasoning from its text, and --regenerate replaces "
                "both: use dspark regenerate first, then capture its file"
            )


answer_options = gathered(
    AnswerOptions,
    "answers",
    [
        click.option(
            "--regenerate",
            is_flag=True,
            help="Let the target answer every supervised turn itself; with vLLM, in the pass that captures.",
        ),
        *sampling_options("--answer-seed", "With --regenerate: "),
    ],
)
"""Add the options of `AnswerOptions` to a click command, which receives them as `answers`."""
