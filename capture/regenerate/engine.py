"""Interface of the two engines: outcomes and reports.

An engine gets every dialogue, including those that an earlier run has answered, and reports each turn when
it is answered. It may be stopped after any report.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from capture.regenerate.dialogue import Answer, Dialogue


@dataclass(frozen=True)
class Outcome:
    """Answer to a dialogue's next turn, or its failure."""

    dialogue: Dialogue
    answer: Answer | None = None
    failure: str | None = None
    """Reason if there is no answer. The row fails, and its later turns are not asked."""


Report = Callable[[Sequence[Outcome]], None]
"""Adds answers to their dialogues, or marks dialogues as failed. Returns when the answers are on disk."""


class Engine(Protocol):
    """Answers dialogues turn by turn, each answer conditioned on those before it."""

    def answer(self, dialogues: Sequence[Dialogue], report: Report) -> None:
        """Answer every turn that has no answer yet.

        The answers depend on the dialogues alone, not on which turns have been answered.
        """
        ...


# End of a sentence or of a line.
_STOP = re.compile(r"[.!?:;](?=[\s\"')\]]|$)|\n")


def trim_unfinished(text: str) -> str:
    """Cut an answer that reached the token limit after its last complete sentence or line.

    An answer with no such place in its second half is returned whole.
    """
    stops = [match.end() for match in _STOP.finditer(text)]
    cut = stops[-1] if stops and stops[-1] * 2 >= len(text) else len(text)
    return text[:cut].rstrip()
