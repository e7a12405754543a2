"""vLLM, run in process in its own environment."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.child import failed
from train.prove.engine import Answer, run

WORKER = Path(__file__).parent / "worker" / "run_vllm.py"


@dataclass(frozen=True)
class Vllm:
    """vLLM.

    Args:
        python: the interpreter of its environment.
        target: directory of the target.
        speculative: its speculative config, without the draft.
        dtype: that it computes in.
        work: folder for what is passed to it, and for its output.
    """

    python: Path
    target: Path
    speculative: Mapping[str, Any]
    dtype: str
    work: Path
    name = "vLLM"

    def serve(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, draft: Path | None) -> Answer:
        """As in `Engine`."""
        name = "plain" if draft is None else "draft"
        asked, answered = (self.work / f"{name}-{part}.json" for part in ("request", "answer"))
        request = {
            "target": str(self.target.absolute()),
            "draft": draft and str(draft.absolute()),
            "speculative": dict(self.speculative),
            "dtype": self.dtype,
            "prompts": [list(prompt) for prompt in prompts],
            "max_new_tokens": max_new_tokens,
        }
        asked.write_text(json.dumps(request), encoding="utf-8")
        log = self.work / f"{name}.log"
        run([self.python, WORKER, asked, answered], log)
        try:
            return Answer(**json.loads(answered.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            raise failed(f"{self.python}, which wrote no answer,", log) from None
