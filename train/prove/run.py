"""Prove an export: run an engine with it and without it, then draft after the engine's text ourselves."""

from __future__ import annotations

import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from pipeline.errors import EngineError, RunError, UsageError
from pipeline.target_model.load import Target
from pipeline.text import reason
from train.decode.benchmark import load_pair, offline_figures
from train.prove.compare import Proof, compare
from train.prove.engine import Engine
from train.prove.llama_cpp import LlamaCpp
from train.prove.vllm import Vllm
from train.runs.names import WEIGHTS
from train.runs.open import TrainedDraft
from train.runs.results import read_evaluation, read_speculation

# Where `make engines` puts them.
ENGINES = {"vllm": Path(".cache/engines/vllm"), "llama.cpp": Path(".cache/engines/llama.cpp")}


def as_exported(folder: Path, draft: TrainedDraft) -> TrainedDraft:
    """Return a run's draft with its weights as an export has them, which are rounded to the export's dtype.

    Raises:
        RunError: the folder is not an export of this draft.
    """
    path = folder / WEIGHTS
    try:
        found = load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"{path} can't be read ({reason(error)}): expected a folder of `dspark export`"
        ) from None
    for name, weight in draft.weights.items():
        other = found.get(name)
        if other is None or other.shape != weight.shape or not torch.equal(other, weight.to(other.dtype)):
            raise RunError(
                f"{path} is not the export of step {draft.step} of {draft.folder}: {name} differs; pass its "
                "--run and --checkpoint"
            )
    weights = {n: found[n].to(weight.dtype) for n, weight in draft.weights.items()}
    return replace(draft, weights=weights)


def open_engine(name: str, path: Path | None, target: Target, draft: TrainedDraft, work: Path) -> Engine:
    """Return an engine that can be started.

    Args:
        name: a key of `ENGINES`.
        path: of vLLM its environment or that one's interpreter, of llama.cpp a built checkout.
        work: folder for its files.

    Raises:
        UsageError: there is no such engine, or it serves no draft of this kind.
    """
    if target.options.adapter is not None:
        raise UsageError("an engine serves a checkpoint: merge --adapter into one, and pass that as --target")
    path = ENGINES[name] if path is None else path
    model = target.directory / (target.options.gguf_file or "")
    dtype = str(target.dtype).removeprefix("torch.")
    if name == "llama.cpp":
        slots = draft.kind.slots(draft.shape)
        return LlamaCpp(path, model, draft.kind.gguf.spec_type, slots, dtype, work)
    python = path / "bin" / "python" if path.is_dir() else path
    if not python.is_file():
        raise UsageError(
            f"expected the environment of vLLM at {path}, which has no bin/python: pass --engine-path, or "
            "run `make engines`"
        )
    speculative = {
        key: value
        for key, value in draft.kind.served(draft.shape)["vllm"].items()
        if key != "draft_sample_method"
    }
    return Vllm(python, model, speculative, dtype, work)


def prove(
    engine: Engine,
    folder: Path,
    draft: TrainedDraft,
    target: Target,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    say: Callable[[str], None],
) -> Proof:
    """Serve prompts with an export, and draft after the same texts ourselves.

    Args:
        folder: the export of `draft`, which has its weights: see `as_exported`.
        target: opened in the engine's dtype.
        say: called with what is being done.

    Raises:
        EngineError: the engine fails.
        RunError: the export is of another draft.
        TargetError: the target can't be loaded.
    """
    evaluation, speculation = read_evaluation(draft.folder), read_speculation(draft.folder)
    expected = offline_figures(evaluation, 0.0, draft.kind.slots(draft.shape))
    measured = [run for run in speculation.runs if run.temperature == 0] if speculation else []
    say(f"{engine.name}: {len(prompts)} prompts without the draft")
    plain = engine.serve(prompts, max_new_tokens, None)
    say(f"{plain.version}: the same with the draft")
    answer = engine.serve(prompts, max_new_tokens, folder)
    say("drafting after its texts here")
    return compare(
        load_pair(target, draft),
        prompts,
        plain,
        answer,
        target=target.name,
        draft=folder.name,
        step=draft.step,
        dtype=str(target.dtype).removeprefix("torch."),
        max_new_tokens=max_new_tokens,
        promised=expected.tokens_per_round if expected else None,
        speculated=measured[0].tokens_per_round if measured else None,
    )


@contextmanager
def work_folder() -> Iterator[Path]:
    """Yield a folder for an engine's files. It stays, without models, after an error that names it."""
    folder = Path(tempfile.mkdtemp(prefix="dspark-prove-"))
    try:
        yield folder
    except (EngineError, RunError) as error:
        if str(folder) not in str(error):
            shutil.rmtree(folder, ignore_errors=True)
        for path in folder.glob("*.gguf"):
            path.unlink()
        raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def ended_whole() -> Iterator[None]:
    """Take SIGTERM, and a closed terminal, for Ctrl-C, so that an engine ends with this process."""
    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # by nohup
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, signal.default_int_handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
