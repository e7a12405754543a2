"""What the two engines share: what they are asked, and how they report.

An engine gets every dialogue, those that an earlier run has answered included, and reports each turn as
it is answered. It may be stopped after any report.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from capture.regenerate.dialogue import Answer, Dialogue


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How answers are drawn."""

    max_new_tokens: int = 512
    temperature: float = 0.7
    """0 is greedy."""
    top_k: int = 50
    """0 is off."""
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """What became of a dialogue's next turn."""

    dialogue: Dialogue
    answer: Answer | None = None
    failure: str | None = None
    """Why the row fails, where there is no answer: none of its later turns is asked then."""


Report = Callable[[Sequence[Outcome]], None]
"""Takes answers into their dialogues, or marks these as failed; returns when that is on disk."""


class Engine(Protocol):
    """Answers dialogues turn by turn, each answer conditioned on the answers before it."""

    def answer(self, dialogues: Sequence[Dialogue], report: Report) -> None:
        """Answer every turn that has no answer yet.

        What it answers depends on the dialogues alone, not on which answers they have already.
        """
        ...


# The last place where a reader would accept a stop: the end of a sentence or of a line.
_STOP = re.compile(r"[.!?:;](?=[\s\"')\]]|$)|\n")


def trim_unfinished(text: str) -> str:
    """Cut an answer that ran into the token limit back to its last sentence or line end.

    An answer with no such place in its second half is returned whole: better a ragged end than none.
    """
    stops = [match.end() for match in _STOP.finditer(text)]
    cut = stops[-1] if stops and stops[-1] * 2 >= len(text) else len(text)
    return text[:cut].rstrip()
