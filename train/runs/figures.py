"""Figures of a draft as they lie beside it: a class per file, and one per table in it.

A class's fields are the file's keys in the file's order: fields of base classes come first, those of the last
base before all others. `[K]` is a list by position in the block: entry k is about the k-th drafted token. It
is None where no measured block reaches that far. Only the last entries can be, as the supervised slots of a
block are its first ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Size of the sample that figures are means over."""

    samples: int
    """Samples with at least one block."""
    blocks: int
    """Blocks with at least one supervised slot."""


@dataclass(frozen=True, kw_only=True)
class Losses:
    """The loss and its terms: weighted means over supervised slots, as `train.losses.slots` defines them."""

    loss: float
    """Weighted sum of the terms."""
    ce_loss: float | None = None
    """Cross entropy with the data's tokens, in nats. Of training's own evaluation the three are None where
    the draft's objective has no such term."""
    l1_loss: float | None = None
    """L1 distance to the target's distribution, from 0 to 2."""
    confidence_loss: float | None = None
    """Binary cross entropy of the confidence head, in nats; None without one, and 0 in older files."""
    further_losses: dict[str, float] = field(default_factory=dict)
    """Terms beyond these three, by name; left out of the file where there are none."""


@dataclass(frozen=True, kw_only=True)
class Acceptance:
    """Acceptance by a target that samples at temperature 1, and (`greedy_`) by one that is greedy.

    Training's own evaluation measures neither the greedy one nor that given the prefix: None there.
    """

    accept_rate: float
    """Mean over supervised slots."""
    accept_by_position: tuple[float | None, ...]
    """Mean over the supervised slots of each position, `[K]`."""
    accept_given_prefix: tuple[float | None, ...] | None = None
    """The same given that all earlier tokens of the block are accepted, as decoding counts it, `[K]`."""
    tau: float
    """Expected tokens per round, the target's own included."""
    greedy_accept_by_position: tuple[float | None, ...] | None = None
    """Share of the supervised slots of each position in which both choose the same token, `[K]`."""
    greedy_accept_given_prefix: tuple[float | None, ...] | None = None
    """The same given that all earlier tokens of the block are accepted, `[K]`."""
    greedy_tau: float | None = None
    """Expected tokens per round, the target's own included."""


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """Expected yield of decoding. A round begins where the last one ended, so it is below tau."""

    tokens_per_round: float
    """The target's own included."""
    accept_given_prefix: tuple[float | None, ...]
    """Accepted share of the tokens at each position whose earlier ones are accepted, `[K]`."""


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """Decoding of the held-out texts."""

    sampling: Rounds
    """At temperature 1."""
    greedy: Rounds
    """At temperature 0."""


@dataclass(frozen=True, kw_only=True)
class Bin:
    """A bar of a reliability diagram."""

    low: float
    """The confidence at its left edge."""
    high: float
    """The confidence at its right edge."""
    count: int
    """Slots in it."""
    predicted: float | None
    """Their mean confidence; None without slots."""
    actual: float | None
    """Their mean acceptance; None without slots."""


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """Agreement of confidences with what the target accepts."""

    ece: float
    """Expected calibration error."""
    ece_by_position: tuple[float | None, ...]
    """The same by position, `[K]`."""
    auc: float | None
    """Probability that an accepted slot has a higher confidence than a rejected one; None without either."""
    auc_by_position: tuple[float | None, ...]
    """The same by position, `[K]`."""
    bins: tuple[Bin, ...]
    """Equal parts of the range from 0 to 1, from left to right."""


@dataclass(frozen=True, kw_only=True)
class Confidence:
    """Reliability of the confidence head."""

    slot: Reliability
    """Of each slot's confidence."""
    prefix: Reliability
    """Of their product over the block up to each slot, which decides what is worth verifying."""


@dataclass(frozen=True, kw_only=True)
class ThresholdRow:
    """Yield of verifying only the confident part of a block."""

    threshold: float
    """A slot is verified while the product of confidences up to it is at least this."""
    verified: float
    """Drafted tokens verified per round."""
    tokens: float
    """Tokens per round, the target's own included."""
    acceptance: float | None
    """Accepted share of the verified tokens; None where none is verified."""


@dataclass(frozen=True, kw_only=True)
class Group(Acceptance, Losses, Counts):
    """Figures of held-out samples with something in common."""

    loss: float | None = None
    """None, as the five fields after it, in files of the first version."""
    ce_loss: float | None = None
    """As in `Losses`."""
    l1_loss: float | None = None
    """As in `Losses`."""
    confidence_loss: float | None = None
    """As in `Losses`."""
    accept_by_position: tuple[float | None, ...] | None = None
    """As in `Acceptance`."""
    confidence: Confidence | None = None
    """None without a confidence head, too."""


@dataclass(frozen=True, kw_only=True)
class Untrained:
    """The same draft with random weights, at training's own held-out anchors."""

    tau: float
    """Expected tokens per round, the target's own included."""
    accept_by_position: tuple[float | None, ...]
    """Mean acceptance of each position, `[K]`."""
    blocks: int | None = None
    """Blocks measured; None in files of the first version."""


@dataclass(frozen=True, kw_only=True)
class CacheFacts:
    """The cache that figures were taken from, and what it costs."""

    target: str
    """Directory name or Hub id of the target."""
    target_weights: str | None = None
    """SHA-256 over the target's weight files; None in files of the first version."""
    data_sha256: str | None = None
    """Over every sample id; None in files of the first version."""
    sources: tuple[str, ...]
    """File names without their directories, and Hub ids."""
    samples: int
    """All of the cache's, held-out or not."""
    tokens: int
    """All of the cache's."""
    bytes: int
    """Size on disk."""
    bytes_per_token: float
    """Size of the shards alone."""
    layer_ids: tuple[int, ...]
    """Captured target layers, counted from 0."""
    context_codec: str
    """Name of the codec of the context features."""
    last_codec: str
    """Name of the codec of the last hidden states."""
    fidelity: dict[str, float]
    """Errors of the stored states against the target's, by what was compared."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Checkpoint and samples of an evaluation."""

    step: int
    """Optimiser step of the checkpoint."""
    samples: int
    """Held-out samples."""
    blocks: int
    """Blocks drafted in them, one per anchor."""
    anchors: int | Literal["all"] | None = None
    """Per sample; "all" are all candidates; None for training's own evaluation."""


@dataclass(frozen=True, kw_only=True)
class Evaluation(Acceptance, Losses, Measured):
    """evaluation.json, of `dspark evaluate`: a draft on the held-out samples of a cache.

    Training's own evaluation is one without the parts that may be None.
    """

    decoding: Decoding | None = None
    """None where not every candidate was an anchor."""
    confidence: Confidence | None = None
    """None without a confidence head."""
    thresholds: tuple[ThresholdRow, ...] | None = None
    """None without a confidence head."""
    by_source: dict[str, Group] | None = None
    """By the name of the file or data set that samples came from."""
    by_length: dict[str, Group] | None = None
    """By a range of tokens, as "128-255"."""
    by_context: dict[str, Group] | None = None
    """By a range of context tokens, those before a block's anchor; None in older files."""
    untrained: Untrained | None = None
    """A draft to compare with."""
    cache: CacheFacts | None = None
    """Sources of the samples."""


@dataclass(frozen=True, kw_only=True)
class CalibrationReport(Counts):
    """Reliability on the samples that the temperatures were not fitted on."""

    before: Confidence
    """With the logits as they are."""
    after: Confidence
    """With the logits divided by the temperatures."""


@dataclass(frozen=True, kw_only=True)
class Sweeps:
    """Threshold sweeps over the samples of `CalibrationReport`."""

    before: tuple[ThresholdRow, ...] | None
    """With the logits as they are."""
    after: tuple[ThresholdRow, ...] | None
    """With the logits divided by the temperatures."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """calibration.json, of `dspark calibrate`. SGLang reads the first five fields, and needs the first.

    The others are None in a file that was made for SGLang alone.
    """

    temperatures: tuple[float, ...]
    """Divisors of the confidence logits by position, `[K]`."""
    dataset: str | None = None
    """The names of the cache's sources."""
    num_samples: int | None = None
    """Blocks that were fitted on."""
    ece_before: tuple[float, ...] | None = None
    """Error of the products of confidences by position, without those that no block reaches, `[<=K]`."""
    ece_after: tuple[float, ...] | None = None
    """The same with the temperatures."""
    step: int | None = None
    """Optimiser step of the checkpoint."""
    fit: Counts | None = None
    """Size of the half that temperatures were fitted on."""
    report: CalibrationReport | None = None
    """Confidences of the other half."""
    thresholds: Sweeps | None = None
    """Yield of thresholds on the other half."""


@dataclass(frozen=True, kw_only=True)
class Parting:
    """Place where the greedy text of speculation and the target's own begin to differ."""

    prompt: int
    """Counted from 0."""
    token: int
    """Of the new tokens, counted from 0."""
    gap: float
    """Lead of the target's best logit there."""


@dataclass(frozen=True, kw_only=True)
class LengthRow:
    """A number of drafted tokens a round."""

    length: int
    """Drafted tokens."""
    draft_ms: float
    """Milliseconds of drafting them, in a round."""
    verify_ms: float
    """Milliseconds of a target step over them and the token before them."""
    tokens_per_round: float | None
    """Expected, the target's own included; None where no acceptance was measured so far into the block."""
    speedup: float | None
    """Expected, over plain decoding."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Expected speed-up of one request, by the number of drafted tokens a round."""

    plain_ms: float
    """Milliseconds of a target step over one token, without a draft."""
    acceptance: Literal["held out", "live"]
    """Source of the acceptance."""
    rows: tuple[LengthRow, ...]
    """From 1 drafted token to K."""
    num_speculative_tokens: int
    """Length of the highest speed-up; 0 if none is above 1."""


@dataclass(frozen=True, kw_only=True)
class SpeculationRun:
    """Live decoding of all prompts at one temperature; means per round are None where there was none."""

    temperature: float
    """0 is greedy."""
    tokens: int
    """Decoded; the first one of each text, which no round makes, is left out."""
    rounds: int
    """Forwards of the target that verified a block."""
    tokens_per_round: float | None
    """The target's own included."""
    accept_given_prefix: tuple[float | None, ...]
    """Accepted share of the tokens that were verified at each position, `[K]`; None where none was."""
    verified_per_round: float | None
    """Drafted tokens that the target looked at."""
    draft_ms: float | None
    """Milliseconds of drafting per round."""
    verify_ms: float | None
    """Milliseconds of verifying per round."""
    plain_ms: float
    """Milliseconds per token that the target decodes alone."""
    speculative_ms: float
    """Milliseconds per token of speculation."""
    speedup: float | None
    """Over plain decoding of the same prompts in the same process; None where either made no token."""
    identical: int | None
    """Prompts whose greedy text is the target's own; None when sampling."""
    partings: tuple[Parting, ...] = ()
    """One per other prompt."""
    offline: Rounds | None = None
    """Expectation of `dspark evaluate`; None where it has none, or where a threshold cuts blocks."""
    lengths: Lengths | None = None
    """None without `--measure`, and then left out of the file."""


@dataclass(frozen=True, kw_only=True)
class Speculation:
    """speculation.json, of `dspark speculate`: decoding with the live target."""

    step: int
    """Optimiser step of the checkpoint."""
    target: str
    """Directory name or Hub id of the target."""
    device: str
    """Kind of device, as "cpu" or "cuda"."""
    dtype: str
    """Name of the dtype that both compute in, as "bfloat16"."""
    prompts: int
    """Number of prompts."""
    max_new_tokens: int
    """Most tokens decoded per prompt."""
    threshold: float
    """A token is verified while the block up to it is accepted with this probability; 0: always."""
    runs: tuple[SpeculationRun, ...]
    """One per temperature."""
