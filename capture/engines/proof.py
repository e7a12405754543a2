"""Prove, before the first shard, that the captured states are the target's own.

Three mistakes raise no error: hooks on the wrong modules, states that padding leaks into, and a teacher from
before the final norm. Each is measured on a few samples of the data; a wrong one is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from capture.data.conversations import TokenizedSample
from capture.engines.checks import check_peaks, row_peaks, state_name
from capture.target import HFDSparkTargetModel
from pipeline.cache import Identity
from pipeline.cache.fidelity import teacher_variation
from pipeline.cache.layout import LAST_HIDDEN
from pipeline.cache.statistics import StateCodec
from pipeline.errors import TargetError
from pipeline.features import head_logits
from pipeline.hooks import tap_states
from pipeline.rope import RopeLengths

if TYPE_CHECKING:
    from capture.engines.engine import CaptureEngine
    from capture.engines.huggingface import HuggingFaceEngine

# Maximum mean total variation between the stored teacher and the target. bf16 rounding of the logits alone
# costs about 0.01; a teacher from before the final norm costs 0.3 or more.
MAX_TEACHER_TV = 0.05
# Tokens of each sample that the proof uses; longer samples are cut.
PROOF_TOKENS = 256
# Maximum relative error of a row, mean over a sample, by the target's dtype. The same module in the same
# forward gives the same numbers; another batch sums in another order in every layer.
SAME_FORWARD = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}
OWN_TEACHER = {torch.float32: 5e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}  # total variation, mean
OTHER_BATCH = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@torch.no_grad()
def prove_states(
    engine: HuggingFaceEngine,
    identity: Identity,
    samples: Sequence[TokenizedSample],
    last_codec: StateCodec | None,
    rope: RopeLengths = RopeLengths(),  # noqa: B008 - frozen
) -> dict[str, float]:
    """Prove hooks, padding and teacher on `samples`, run as one padded batch and one of them alone.

    Args:
        last_codec: codec of last hidden states; None if they are not stored.
        rope: lengths that may not share a batch; samples that would differ so are cut to one length.

    Returns:
        The relative error of a padded row and, if last hidden states are stored, the total variation between
        the target's own next-token distribution and the one from the stored ones (mean and maximum over
        rows) and the number of these rows.

    Raises:
        TargetError: an error is larger than rounding explains.
    """
    samples = sorted(samples, key=lambda s: -len(s.input_ids))
    width = min(PROOF_TOKENS, len(samples[0].input_ids))
    cuts = [width] + [max(2, 3 * width // 4)] * (len(samples) - 1)  # so that there is padding
    lengths = np.minimum([len(s.input_ids) for s in samples], cuts)
    if rope.matter(lengths):
        cuts = [int(lengths.min())] * len(samples)
    samples = [
        TokenizedSample(s.source_row, s.input_ids[:cut], s.loss_mask[:cut])
        for s, cut in zip(samples, cuts, strict=True)
    ]
    shortest = min(range(len(samples)), key=lambda i: len(samples[i].input_ids))
    sample, target = samples[shortest], engine.target
    layer_ids = identity.features.layer_ids
    ids = torch.from_numpy(sample.input_ids.astype(np.int64))[None].to(engine.device)
    with tap_states(target.model, layer_ids) as tapped:
        output = target.model(input_ids=ids, use_cache=False, output_hidden_states=True)
    for key, rows in tapped.items():
        check_peaks(row_peaks(rows[0]).cpu().numpy(), key, sample)
    _prove_hooks(target, tapped, output)
    teacher = _prove_teacher(engine, identity, last_codec, tapped[LAST_HIDDEN][0], output.logits[0])
    alone = {key: rows[0] for key, rows in tapped.items()}
    return teacher | {"proof.padding_error": _prove_padding(engine, alone, samples, shortest)}


@torch.no_grad()
def prove_batch(engine: CaptureEngine, samples: Sequence[TokenizedSample]) -> float:
    """Prove that the shortest of `samples` has the same states alone and in their batch.

    Returns:
        The relative error of its rows.

    Raises:
        TargetError: they differ more than rounding explains.
    """
    shortest = min(range(len(samples)), key=lambda i: len(samples[i].input_ids))
    alone = engine.states([samples[shortest]]).take_all()
    return _prove_padding(engine, alone, samples, shortest)


def _prove_hooks(target: HFDSparkTargetModel, tapped: dict[int | str, Tensor], output: object) -> None:
    """Prove that hooked states are Hugging Face's own, in the convention of `pipeline.features`."""
    returned = getattr(output, "hidden_states", None)
    if returned is None or len(returned) != target._num_layers + 1:
        return  # a custom model that returns none; its teacher is still proved
    expected = {i: returned[i + 1] for i in target.target_layer_ids} | {LAST_HIDDEN: returned[-1]}
    for key, rows in expected.items():
        _require_same(
            tapped[key][0],
            rows[0],
            SAME_FORWARD.get(rows.dtype, 1e-2),
            f"{state_name(key)} as hooked is not the hidden state that {type(target.model).__name__} returns",
            "pipeline/hooks.py found other modules than its layers and final norm: correct its tables",
        )


def _prove_teacher(
    engine: HuggingFaceEngine,
    identity: Identity,
    codec: StateCodec | None,
    last_hidden: Tensor,
    logits: Tensor,
) -> dict[str, float]:
    """Prove that head(last hidden), as hooked and as stored, is the target's next-token distribution.

    Args:
        codec: None proves it as hooked only, and returns no figures.
        last_hidden: as hooked, `[S, H]`.
        logits: the target's own, `[S, V]`.
    """
    head, facts, name = engine.head, identity.target, type(engine.target.model).__name__

    def variation(rows: Tensor) -> Tensor:
        """Return the total variation `[S]` between the target's distribution and that of `rows`."""
        found = head_logits(rows.to(head.device), head, facts.final_logit_softcapping, facts.logit_scale)
        if found.shape != logits.shape:
            return torch.ones(len(rows))
        expected = logits.to(head.device).float().softmax(-1)
        return (found.softmax(-1) - expected).abs().sum(-1) / 2

    def require(found: Tensor, limit: float) -> float:
        """Return the mean. Raises TargetError if it is above the limit."""
        mean = found.mean().item()
        if not mean <= limit:
            raise TargetError(
                f"the captured teacher is not the target's: mean total variation {mean:.3f}, expected at "
                f"most {limit}; {name} changes its logits after lm_head in a way that "
                "this version does not record: use another target"
            )
        return mean

    # First as hooked, where only rounding differs; then as stored by the codec.
    require(variation(last_hidden), OWN_TEACHER.get(last_hidden.dtype, MAX_TEACHER_TV))
    if codec is None:
        return {}
    decoded = torch.empty(last_hidden.shape, dtype=torch.bfloat16, device=last_hidden.device)
    codec.decode(codec.encode(last_hidden), decoded)
    stored = variation(decoded)
    return {
        "proof.teacher_tv_mean": require(stored, MAX_TEACHER_TV),
        "proof.teacher_tv_max": stored.max().item(),
        "proof.teacher_tv_rows": float(len(stored)),
    }


def stored_teacher(
    identity: Identity, head: Tensor, codec: StateCodec, last_hidden: Tensor
) -> dict[str, float]:
    """Prove that last hidden states `[n, H]` as stored give the same next-token distribution as they do.

    Returns:
        The total variation between the two, mean and maximum over rows, and the number of rows.

    Raises:
        TargetError: the mean is above `MAX_TEACHER_TV`.
    """
    decoded = torch.empty(last_hidden.shape, dtype=torch.bfloat16, device=last_hidden.device)
    codec.decode(codec.encode(last_hidden), decoded)
    stored = teacher_variation(head, identity, decoded, last_hidden)
    mean = stored.mean().item()
    if not mean <= MAX_TEACHER_TV:
        raise TargetError(
            f"the stored teacher is not the target's: mean total variation {mean:.3f}, expected at most "
            f"{MAX_TEACHER_TV}: choose another --last-codec"
        )
    return {
        "proof.teacher_tv_mean": mean,
        "proof.teacher_tv_max": stored.max().item(),
        "proof.teacher_tv_rows": float(len(stored)),
    }


def prove_same(
    got: Tensor, want: Tensor, key: int | str, other: str = "of a second pass over the same tokens"
) -> float:
    """Prove that an engine's states `[n, H]` are also those of another run. Return the relative error.

    Args:
        other: the other run, for messages.

    Raises:
        TargetError: they differ more than the order of sums explains.
    """
    return _require_same(
        got,
        want,
        OTHER_BATCH.get(want.dtype, 1e-1),
        f"{state_name(key)} of the engine is not that {other}",
        "use --engine huggingface, or another version of the engine",
    )


def _prove_padding(
    engine: CaptureEngine,
    alone: Mapping[int | str, Tensor],
    samples: Sequence[TokenizedSample],
    shortest: int,
) -> float:
    """Prove that a sample has the same states `[S, H]` alone and in a batch through capture's forward."""
    start = sum(len(sample.input_ids) for sample in samples[:shortest])
    length = len(samples[shortest].input_ids)
    states = engine.states(samples)
    worst = 0.0
    for key, rows in alone.items():
        error = _require_same(
            states.take(key)[start : start + length],
            rows,
            OTHER_BATCH.get(rows.dtype, 1e-1),
            f"{state_name(key)} of a row of {length} tokens changes when other rows share its batch",
            engine.leak,
        )
        worst = max(worst, error)
    return worst


def _require_same(got: Tensor, want: Tensor, limit: float, problem: str, remedy: str) -> float:
    """Return the relative error: the mean over rows `[S, H]` of |got - want| / |want|.

    Raises:
        TargetError: it is above `limit`, or NaN.
    """
    got, want = got.float(), want.to(got.device).float()
    floor = torch.finfo(torch.float32).tiny
    error = ((got - want).norm(dim=1) / want.norm(dim=1).clamp_min(floor)).mean().item()
    if not error <= limit:
        raise TargetError(f"{problem}: relative error {error:.2g}, expected at most {limit:g}; {remedy}")
    return error
