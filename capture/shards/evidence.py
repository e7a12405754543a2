"""Choose rows of the data, prove the target on them before the first shard, and say what was seen.

The rows are a pure function of the plan, so that every process proves the same. A row whose states can't be
used proves nothing; the next candidate takes its place.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np

from capture.batching import CapturePlan
from capture.console import note
from capture.data.conversations import TokenizedSample
from capture.engines.checks import check_peaks, problem, row_peaks
from capture.engines.engine import CaptureEngine
from capture.engines.proof import prove_batch
from capture.prefixes import usable
from capture.prepare import PreparedCapture
from capture.shards.prediction import Judgement, judge, measure_prediction
from pipeline.cache import Identity
from pipeline.cache.skipped import TOO_LARGE
from pipeline.cache.statistics import StateCodec
from pipeline.device import if_it_fits
from pipeline.errors import TargetError

# Candidates tried before the target is refused, and rows whose predictions are measured.
CANDIDATES = 8
# Tokens of a row, and of all rows together, whose predictions are measured.
ROW_TOKENS, ALL_TOKENS = 1024, 2048


def prove_target(
    engine: CaptureEngine,
    identity: Identity,
    prepared: PreparedCapture,
    last_codec: StateCodec | None,
    speaks: bool,
) -> dict[str, float]:
    """Prove the target on rows of the data, and judge its predictions.

    Args:
        last_codec: codec of last hidden states; None if they are not stored.
        speaks: print what was seen. One of several processes does.

    Returns:
        The figures for the manifest's `fidelity`.

    Raises:
        TargetError: states are not the target's own or can't be used, or, without `--no-proof`, the
            predictions are impossible for the right model.
    """
    pairs = _Pairs(engine, prepared)
    pair, rope = pairs.first(), prepared.rope
    proof = if_it_fits(lambda: engine.prove(identity, pair, last_codec, rope))
    if proof is None:  # both at once: each of them fits
        proof = engine.prove(identity, pair[-1:], last_codec, rope)
    for batch in (*proof_batches(prepared), *sharing_batches(prepared, pairs)):
        several = pairs.usable(batch) or []
        if len(several) > 1:  # one that does not fit is split by the capture, too
            error = if_it_fits(functools.partial(prove_batch, engine, several)) or 0.0
            proof["proof.padding_error"] = max(proof["proof.padding_error"], error)
    prediction = measure_prediction(engine, identity.target, predicted_rows(prepared))
    if prediction is None:
        return proof
    judgement = judge(prediction, engine.head.shape[0])
    if judgement.verdict == "impossible" and not prepared.options.no_proof:
        raise TargetError(f"{judgement.line}; --no-proof captures it anyway")
    if speaks:
        _say(judgement)
    return proof | prediction.figures()


def _say(judgement: Judgement) -> None:
    note(judgement.line if judgement.verdict == "good" else f"warning: {judgement.line}")


def sharing_batches(prepared: PreparedCapture, pairs: _Pairs) -> Iterator[range]:
    """Yield a batch whose samples begin alike for long enough to read that once, two of them usable, if any.

    One of a few candidates: a batch whose samples are bad proves nothing.
    """
    shared, tried = prepared.shared, 0
    for batch in prepared.batching.batches if shared else ():
        if len(batch) == 1 or not usable(min(shared[batch.start + 1 : batch.stop])):
            continue
        if len(pairs.usable(batch) or ()) > 1:
            yield batch
            return
        tried += 1
        if tried == CANDIDATES:
            return


class _Pairs:
    """First and last sample of batches, as far as their states can be used."""

    def __init__(self, engine: CaptureEngine, prepared: PreparedCapture):
        self._engine, self._prepared = engine, prepared
        self._problems: dict[int, str] = {}
        """Problem of each tried sample, empty for a usable one, by its number in the cache's order."""

    def usable(self, batch: range) -> list[TokenizedSample] | None:
        """Return the usable ones of the first and last sample of a batch; None if there are none."""
        pair = sorted({batch[0], batch[-1]})
        samples = [_sample(self._prepared, i) for i in pair if not self._problem(i)]
        return samples or None

    def first(self) -> list[TokenizedSample]:
        """Return the first usable pair among the candidates, else the first usable sample.

        Raises:
            TargetError: there is none.
        """
        single = None
        for batch in _candidates(self._prepared):
            found = self.usable(batch)
            if found and (len(found) > 1 or len(batch) == 1):
                return found
            single = single or found
        if single is None:
            rows = f"{len(self._problems):,} rows" if len(self._problems) > 1 else "its row"
            raise TargetError(
                f"the target's states can't be used for every one of {rows} of the data that were tried: "
                f"{next(iter(self._problems.values()))}"
            )
        return single

    def _problem(self, i: int) -> str:
        if i not in self._problems:
            self._problems[i] = state_problem(self._engine, _sample(self._prepared, i))
        return self._problems[i]


def state_problem(engine: CaptureEngine, sample: TokenizedSample) -> str:
    """Return what is wrong with a sample's states when it runs alone, or nothing."""
    place = f"row {sample.source_row + 1} of the data"
    states = if_it_fits(lambda: engine.states([sample]))
    if states is None or states.failed:
        reason = TOO_LARGE if states is None else states.failed[0]
        return problem(place, reason, None, len(sample.input_ids))
    try:
        for key, rows in states.take_all().items():
            check_peaks(row_peaks(rows).cpu().numpy(), key, sample)
    except TargetError as error:
        return str(error)
    return ""


def _sample(prepared: PreparedCapture, i: int) -> TokenizedSample:
    return prepared.data[int(prepared.batching.order[i])]


def _ends(prepared: PreparedCapture) -> tuple[np.ndarray, np.ndarray]:
    """Return the lengths of the longest and of the shortest sample of each batch."""
    lengths, plan = prepared.data.facts.lengths[prepared.batching.order], prepared.batching
    return (
        np.array([lengths[b[0]] for b in plan.batches]),
        np.array([lengths[b[-1]] for b in plan.batches]),
    )


def _candidates(prepared: PreparedCapture) -> Iterator[range]:
    """Yield batches for the proof of states: of samples of different lengths first, then of any."""
    plan: CapturePlan = prepared.batching
    longest, shortest = _ends(prepared)
    several = np.array([len(batch) > 1 for batch in plan.batches])
    wanted = np.where(several & (longest != shortest), 0, np.where(several, 1, 2))
    for b in np.argsort(wanted, kind="stable")[:CANDIDATES]:
        yield plan.batches[int(b)]


def proof_batches(prepared: PreparedCapture) -> list[range]:
    """Return batches of the lengths that occur: longest, shortest, and both sides of the first RoPE switch.

    Only batches of several samples count: any other holds a row alone.
    """
    plan, (longest, shortest) = prepared.batching, _ends(prepared)
    several = [b for b, batch in enumerate(plan.batches) if len(batch) > 1]
    if not several:
        return []
    by_length = sorted(several, key=lambda b: (longest[b], shortest[b], b))
    groups = prepared.rope.groups(longest[by_length])
    switches = np.flatnonzero(np.diff(groups))[:1]  # dynamic RoPE has one per length
    chosen = [0, len(by_length) - 1, *(i + side for i in switches.tolist() for side in (0, 1))]
    return [plan.batches[b] for b in dict.fromkeys(by_length[i] for i in chosen)]


def predicted_rows(prepared: PreparedCapture) -> list[TokenizedSample]:
    """Return rows spread evenly over the cache, cut to a bounded number of tokens."""
    total, rows = 0, []
    for i in dict.fromkeys(np.linspace(0, len(prepared.data) - 1, CANDIDATES).astype(int).tolist()):
        sample = _sample(prepared, i)
        cut = min(ROW_TOKENS, ALL_TOKENS - total, len(sample.input_ids))
        if cut < 2:
            break
        rows.append(TokenizedSample(sample.source_row, sample.input_ids[:cut], sample.loss_mask[:cut]))
        total += cut
    return rows
