"""Answer dialogues through an engine and write a file, resuming interrupted runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from capture.data.stdin import STDIN
from capture.regenerate.dialogue import Dialogue, to_json
from capture.regenerate.engine import Engine, Outcome
from capture.regenerate.progress import Progress, progress_path
from capture.sampling import Sampling
from pipeline import files
from pipeline.errors import DataError, UsageError

if TYPE_CHECKING:
    import torch


def failed_path(out: Path) -> Path:
    """Return the file that lists the failed rows."""
    return out.with_name(f"{out.name}.failed.jsonl")


def check_output(out: Path, data: Sequence[str], *, fresh: bool) -> None:
    """Raise UsageError if `out` can't be written, or would replace a file of another origin."""
    if not out.parent.is_dir():
        raise UsageError(f"--out {out}: no such directory {out.parent}; make it first")
    if out.is_dir():
        raise UsageError(f"--out {out} is a directory: expected a file to write")
    if any(out.resolve().is_relative_to(Path(spec).resolve()) for spec in data if spec != STDIN):
        raise UsageError(f"--out {out} would be part of --data: write it elsewhere")
    if out.exists() and not fresh and not progress_path(out).exists():
        raise UsageError(f"--out {out} exists already: name another file, or replace it with --fresh")


def regenerate_file(
    dialogues: Sequence[Dialogue], engine: Engine, out: Path, run: dict[str, Any], *, fresh: bool = False
) -> list[Outcome]:
    """Answer every dialogue and write `out`, in input order, without the rows that fail.

    A killed call continues when it is repeated with the same arguments: `OUT.progress` keeps the answers
    until every row is answered. Failed rows are listed in `OUT.failed.jsonl`; the progress is then kept, so
    that the next call asks only for them.

    Args:
        run: settings that decide the answers, by name.
        fresh: discard existing progress.

    Returns:
        The failures, in input order.

    Raises:
        UsageError: the existing progress belongs to another run.
    """
    progress = Progress(progress_path(out), run, dialogues, fresh=fresh)
    try:

        def keep(outcomes: Sequence[Outcome]) -> None:
            progress.record([(o.dialogue, o.answer) for o in outcomes if o.answer is not None])

        failures = sorted(_drive(dialogues, engine, keep), key=lambda failure: failure.dialogue.number)
        files.remove_partials(out.parent)
        write_jsonl(out, (dialogue.result() for dialogue in dialogues if dialogue.finished))
        if failures:
            write_jsonl(failed_path(out), map(_failed_row, failures))
        else:
            failed_path(out).unlink(missing_ok=True)
            progress.remove()
    finally:
        progress.close()
    return failures


def regenerate(
    model: torch.nn.Module,
    tokenizer: Any,
    conversations: Sequence[dict[str, Any]],
    *,
    max_new_tokens: int = 512,
    temperature: float = 0.7,
    top_k: int = 50,
    top_p: float = 1.0,
    batch_size: int = 64,
    seed: int = 0,
    where: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Replace every assistant turn by the target's own answer, turn by turn, in memory.

    Args:
        where: name of each conversation in errors. None: `conversation N`, counted from 1.

    Returns:
        New conversations in input order; the input is unchanged.

    Raises:
        DataError: the chat template refuses a conversation, it exceeds the target's positions, or the
            assistant opens it.
    """
    from capture.regenerate.huggingface import HuggingFaceEngine, context_length

    places = where or [f"conversation {i + 1}" for i in range(len(conversations))]
    dialogues = [
        Dialogue(number, place, copy.deepcopy(conversation))
        for number, (place, conversation) in enumerate(zip(places, conversations, strict=True))
    ]
    sampling = Sampling(
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed
    )
    engine = HuggingFaceEngine(
        lambda: model,
        tokenizer,
        sampling,
        batch_size=batch_size,
        context_length=context_length(model.config),
    )

    def refuse_failures(outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            if outcome.answer is None:
                raise DataError(f"{outcome.dialogue.where}: {outcome.failure}")

    _drive(dialogues, engine, refuse_failures)
    return [dialogue.result() for dialogue in dialogues]


def _drive(
    dialogues: Sequence[Dialogue], engine: Engine, keep: Callable[[Sequence[Outcome]], None]
) -> list[Outcome]:
    """Run the engine under a progress bar of turns. Return the failures. `keep` gets each report first."""
    failures: list[Outcome] = []
    total = sum(len(dialogue.turns) for dialogue in dialogues)
    answered = sum(len(dialogue.answers) for dialogue in dialogues)
    with tqdm(total=total, initial=answered, unit="turn", desc="regenerate") as bar:

        def report(outcomes: Sequence[Outcome]) -> None:
            keep(outcomes)
            for outcome in outcomes:
                if outcome.answer is not None:
                    outcome.dialogue.answers.append(outcome.answer)
                    bar.update(1)
                else:
                    failures.append(outcome)
                    bar.update(len(outcome.dialogue.turns) - len(outcome.dialogue.answers))
                    bar.set_postfix(failed=len(failures), refresh=False)

        engine.answer(dialogues, report)
    return failures


def _failed_row(failure: Outcome) -> dict[str, Any]:
    dialogue = failure.dialogue
    return {
        "row": dialogue.number + 1,
        "where": dialogue.where,
        "turn": len(dialogue.answers) + 1,
        "reason": failure.failure,
    }


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write one JSON object per line under a temporary name, so that a reader never sees half a file."""

    def write(partial: Path) -> None:
        with partial.open("w", encoding="utf-8") as file:
            file.writelines(to_json(row) + "\n" for row in rows)

    files.publish(path, write)
