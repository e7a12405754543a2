"""A draft at work beside its live target: `dspark speculate`.

Only this module of `train/` loads a target. Speculation is compared with plain decoding by the same target in
the same process, and with what the cache promised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pipeline.errors import RunError, UsageError
from pipeline.hooks import input_device, learned_positions
from pipeline.target_model.load import Target
from pipeline.text import figure_table
from train.decode.lengths import format_lengths, measure_steps, recommend
from train.decode.speculative import Decoded, decode_plain, decode_speculative
from train.decode.target import CachedTarget
from train.draft.kind import Decoder
from train.runs.figures import Evaluation, Parting, Rounds, Speculation, SpeculationRun
from train.runs.open import TrainedDraft
from train.runs.results import read_evaluation, read_temperatures

# Largest distance of the target's two best logits at which rounding explains that a forward over several
# tokens chooses another token than one over a single token.
ROUNDING = {torch.float64: 1e-4, torch.float32: 1e-2, torch.float16: 0.5, torch.bfloat16: 1.0}


@dataclass(frozen=True)
class Pair:
    """A live target and a draft that shares its embedding and head."""

    name: str
    """The target's."""
    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    draft: PreTrainedModel
    decoder: Decoder
    """The draft at work."""
    stop: frozenset[int]
    """Token ids that end a text."""
    step: int
    """The draft's."""
    warning: str | None
    """About the two together; None where they fit."""


def load_pair(target: Target, trained: TrainedDraft) -> Pair:
    """Load a target beside a draft, in the target's dtype.

    Raises:
        TargetError: the target can't be loaded.
        RunError: the draft is for a target of another shape.
    """
    wanted, identity = trained.target, target.identity()
    shape = ("hidden_size", "num_layers", "vocab_size")
    differing = [
        f"{name} {getattr(identity, name)}, the draft's is for {getattr(wanted, name)}"
        for name in shape
        if getattr(identity, name) != getattr(wanted, name)
    ]
    if differing:
        raise RunError(
            f"{target.name} is not the target that {trained.folder} was trained for, {wanted.name} "
            f"({'; '.join(differing)}): give that one as --target"
        )
    warning = None
    if identity.weights != wanted.weights:
        warning = (
            f"the draft was trained for {wanted.name} and {target.name} has other weights: the text is "
            "right all the same, but less will be accepted"
        )
    tokenizer, model = target.tokenizer(), target.model()
    device = input_device(model)
    draft = trained.model()
    parts = (model.get_input_embeddings(), model.get_output_embeddings())
    embedding, head = (part.weight.detach() for part in parts)
    # The same memory. If the target has it elsewhere, `to` copies it and leaves the target alone.
    draft.embed_tokens.weight = nn.Parameter(embedding, requires_grad=False)
    if not draft.trains_head:
        draft.lm_head.weight = nn.Parameter(draft.head_rows(head), requires_grad=False)
    draft = draft.to(device, target.dtype).eval().requires_grad_(False)
    return Pair(
        name=target.name,
        model=model,
        tokenizer=tokenizer,
        draft=draft,
        decoder=trained.kind.decoder(draft),
        stop=_stops(model, tokenizer),
        step=trained.step,
        warning=warning,
    )


def _stops(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = [own] if isinstance(own, int) else map(int, [] if own is None else own)
    return frozenset(i for i in (*ids, tokenizer.eos_token_id) if i is not None)


def speculate_all(
    pair: Pair,
    folder: Path,
    prompts: Sequence[Sequence[int]],
    *,
    temperatures: Sequence[float],
    max_new_tokens: int,
    threshold: float = 0.0,
    seed: int = 0,
    measure: bool = False,
    show: Callable[[str], None] | None = None,
) -> Speculation:
    """Speculate at each temperature; confidences are calibrated if the checkpoint has temperatures for them.

    Args:
        folder: of the draft's checkpoint, with what was measured offline and fitted.
        measure: also time steps over 1 to K drafted tokens, and recommend a number.
        show: called with every prompt and text.

    Raises:
        UsageError: a threshold for a draft without a confidence head, or beside `measure`.
        RunError: figures beside the draft can't be read; or see `speculate`.
    """
    if threshold > 0 and not pair.decoder.has_confidence:
        raise UsageError("--threshold needs a confidence head, and this draft has none: leave it out")
    if threshold > 0 and measure:
        raise UsageError("--measure recommends one length for every block: leave --threshold out")

    # Read before any work. What an evaluation expects is of whole blocks only.
    scales = read_temperatures(folder, pair.decoder.slots) if threshold > 0 else None
    evaluation = None if threshold > 0 else read_evaluation(folder)

    def seen(prompt: list[int], tokens: list[int]) -> None:
        if show is not None:
            show(f"> {pair.tokenizer.decode(prompt)}\n{pair.tokenizer.decode(tokens)}\n")

    runs = []
    for temperature in dict.fromkeys(temperatures):
        found = speculate(
            pair,
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            threshold=threshold,
            confidence_temperatures=scales,
            seed=seed,
            seen=seen,
        )
        offline = offline_figures(evaluation, temperature, pair.decoder.slots)
        lengths = None
        if measure:
            alone, watched = (
                CachedTarget(pair.model, ids) for ids in ((), pair.draft.config.target_layer_ids)
            )
            times = measure_steps(alone, watched, pair.decoder, prompts, max_new_tokens, temperature)
            lengths = recommend(times, found, offline)
        runs.append(replace(found, offline=offline, lengths=lengths))
    return Speculation(
        step=pair.step,
        target=pair.name,
        device=pair.draft.device.type,
        dtype=str(pair.draft.dtype).removeprefix("torch."),
        prompts=len(prompts),
        max_new_tokens=max_new_tokens,
        threshold=threshold,
        runs=tuple(runs),
    )


def speculate(
    pair: Pair,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    threshold: float = 0.0,
    confidence_temperatures: Sequence[float] | None = None,
    seed: int = 0,
    seen: Callable[[list[int], list[int]], None] = lambda _prompt, _tokens: None,
) -> SpeculationRun:
    """Decode every prompt twice, plainly and speculatively, and add up.

    Args:
        prompts: token ids.
        seen: called with each prompt and what was decoded.

    Raises:
        RunError: greedy texts differ by more than rounding explains, or the prompts do not fit the target.
    """
    limit, slots = learned_positions(pair.model), pair.decoder.slots
    longest = max(map(len, prompts)) + max_new_tokens + slots  # the last block may reach beyond the end
    if limit is not None and longest > limit:
        raise RunError(
            f"the longest prompt, --max-new-tokens and a block make {longest:,} tokens, but the target "
            f"learned {limit:,} positions: lower --max-new-tokens, or leave long prompts out"
        )
    plain: list[Decoded] = []
    fast: list[Decoded] = []
    partings: list[Parting] = []
    options = {"temperature": temperature, "stop": pair.stop}
    alone, watched = (CachedTarget(pair.model, ids) for ids in ((), pair.draft.config.target_layer_ids))
    few = min(max_new_tokens, 4)
    decode_plain(alone, prompts[0], few)  # not timed: the first forwards are slow
    with watched:
        decode_speculative(watched, pair.decoder, prompts[0], few)
    for number, prompt in enumerate(prompts):
        generators = [torch.Generator(alone.device).manual_seed(seed + number) for _ in range(2)]
        own = decode_plain(alone, prompt, max_new_tokens, **options, generator=generators[0])
        with watched:  # plain decoding has no hooks
            result = decode_speculative(
                watched,
                pair.decoder,
                prompt,
                max_new_tokens,
                **options,
                threshold=threshold,
                confidence_temperatures=confidence_temperatures,
                generator=generators[1],
            )
        plain.append(own)
        fast.append(result)
        seen(list(prompt), result.tokens)
        if temperature == 0 and result.tokens != own.tokens:
            partings.append(_parting(alone, number, prompt, own.tokens, result.tokens))
    _check_partings(partings, pair.draft.dtype)
    return _add_up(temperature, plain, fast, partings)


def _parting(
    target: CachedTarget, number: int, prompt: Sequence[int], own: list[int], other: list[int]
) -> Parting:
    """Find where two greedy texts begin to differ, and by how much the target's best logit leads there."""
    pairs = zip(own, other, strict=False)
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(own), len(other)))
    target.reset()
    logits, _ = target.forward(torch.tensor([*prompt, *own[:first]]), 1)
    best, second = logits[0].topk(2).values.tolist()
    return Parting(prompt=number, token=first, gap=best - second)


def _check_partings(partings: Sequence[Parting], dtype: torch.dtype) -> None:
    worst = max(partings, key=lambda parting: parting.gap, default=None)
    if worst is not None and worst.gap > ROUNDING[dtype]:
        raise RunError(
            f"speculation changed the greedy text of prompt {worst.prompt + 1} at token "
            f"{worst.token + 1}, where the target's two best logits are {worst.gap:.3g} apart: more "
            f"than {str(dtype).removeprefix('torch.')} rounding explains. This target's cache can't take "
            "tokens back, or it is a bug: please report it"
        )


def _add_up(
    temperature: float, plain: Sequence[Decoded], fast: Sequence[Decoded], partings: Sequence[Parting]
) -> SpeculationRun:
    """Take means over all rounds and all tokens, without the first token of each text: no round makes it."""

    def total(results: Sequence[Decoded], name: str) -> float:
        return sum(getattr(result, name) for result in results)

    tokens, own_tokens = total(fast, "emitted"), sum(len(result.tokens) - 1 for result in plain)
    rounds = total(fast, "rounds")
    tried = [sum(column) for column in zip(*(result.tried for result in fast), strict=True)]
    accepted = [sum(column) for column in zip(*(result.accepted for result in fast), strict=True)]
    plain_ms = 1000 * total(plain, "seconds") / max(own_tokens, 1)
    speculative_ms = 1000 * total(fast, "seconds") / max(tokens, 1)
    return SpeculationRun(
        temperature=temperature,
        tokens=tokens,
        rounds=rounds,
        tokens_per_round=tokens / rounds if rounds else None,
        accept_given_prefix=tuple(a / t if t else None for a, t in zip(accepted, tried, strict=True)),
        verified_per_round=total(fast, "verified") / rounds if rounds else None,
        draft_ms=1000 * total(fast, "draft_seconds") / rounds if rounds else None,
        verify_ms=1000 * total(fast, "verify_seconds") / rounds if rounds else None,
        plain_ms=plain_ms,
        speculative_ms=speculative_ms,
        speedup=plain_ms / speculative_ms if tokens and own_tokens else None,
        identical=len(plain) - len(partings) if temperature == 0 else None,
        partings=tuple(partings),
    )


def offline_figures(evaluation: Evaluation | None, temperature: float, slots: int) -> Rounds | None:
    """Return what an evaluation expects of decoding at this temperature; None where it has not said.

    It knows temperatures 0 and 1, if every candidate was an anchor.

    Args:
        slots: K.
    """
    if evaluation is None or evaluation.decoding is None or temperature not in (0, 1):
        return None
    expected = evaluation.decoding.sampling if temperature else evaluation.decoding.greedy
    return expected if len(expected.accept_given_prefix) == slots else None


def format_speculation(result: Speculation) -> str:
    """Lay the figures out for a terminal: live beside offline."""
    threshold = result.threshold
    verifying = f"verifying while {threshold} sure" if threshold else "verifying whole blocks"
    lines = [
        f"step {result.step} beside {result.target} ({result.dtype}, {result.device}): "
        f"{result.prompts} prompts, up to {result.max_new_tokens} new tokens, {verifying}"
    ]
    for run in result.runs:
        expected = run.offline.tokens_per_round if run.offline else None
        theirs = run.offline.accept_given_prefix if run.offline else [None] * len(run.accept_given_prefix)
        rows = [
            (f"temperature {run.temperature:g}", ["live", "offline"]),
            ("tokens per round", [run.tokens_per_round, expected]),
            *(
                (f"accepted at {k + 1}, given the tokens before it", pair)
                for k, pair in enumerate(zip(run.accept_given_prefix, theirs, strict=True))
            ),
        ]
        lines += figure_table(rows)
        if run.speedup is not None:
            lines += (
                f"  {run.tokens:,} tokens in {run.rounds:,} rounds, each {run.draft_ms:.1f} ms "
                f"drafting and {run.verify_ms:.1f} ms verifying",
                f"  {run.speculative_ms:.1f} ms per token; plain decoding {run.plain_ms:.1f} ms: "
                f"{run.speedup:.2f} times as fast",
            )
        if run.lengths is not None:
            lines += format_lengths(run.lengths, result.device)
        if run.identical is not None:
            lines.append(
                f"  the text is the target's own greedy text, token by token, for {run.identical} of "
                f"{result.prompts} prompts"
            )
        lines += (
            f"  prompt {parting.prompt + 1} parts at token {parting.token + 1}, where the target's two "
            f"best logits are {parting.gap:.2g} apart: rounding"
            for parting in run.partings
        )
    return "\n".join(lines)
