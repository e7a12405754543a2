"""Prepare a capture: target, tokens, batches and shards, without loading any weights."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from capture.batching import CapturePlan, Limits, plan_capture, plan_sharing
from capture.data.conversations import TokenizedSample
from capture.data.preparation import prepare_data
from capture.data.tokens import TokenizedData
from capture.engines.identity import check_engine, engine_identity
from capture.engines.options import HUGGING_FACE, VLLM
from capture.example import with_example
from capture.one_pass.turns import longest_lengths
from capture.options import CaptureOptions
from pipeline.cache import DataIdentity, FeatureIdentity, Identity, SampleFacts, build_index, read_manifest
from pipeline.cache.features import ALL_TOKENS, EACH, NO_LAST_HIDDEN, ONCE
from pipeline.cache.manifest import MANIFEST, PROMPTS, Manifest, Plan
from pipeline.cache.same import refuse_another
from pipeline.errors import CacheError, DataError
from pipeline.features import default_layer_ids, validate_target_layer_ids
from pipeline.remote.address import Address, Place
from pipeline.rope import RopeLengths, rope_lengths
from pipeline.target_model.load import DTYPES, Target, open_target
from pipeline.target_model.options import TargetOptions
from pipeline.target_model.quantisation import quantisation

# Name, among the recorded settings, of how answers are sampled. The hash of the prompts with that is recorded
# as `PROMPTS`, and stands in place of the samples' while they are sampled.
ANSWERS = "regenerate"
# Name, among the recorded settings, of the lengths at which the target's RoPE changes within the data.
ROPE = "rope"


@dataclass(frozen=True, eq=False)
class PreparedCapture:
    """Everything that a capture needs except the target's weights."""

    options: CaptureOptions
    target: Target
    identity: Identity
    """Identity of the cache, without the hash of the target's weights."""
    found: Identity | None
    """Identity of the cache that the directory already holds, if any."""
    data: TokenizedData
    batching: CapturePlan
    index: pa.Table
    plan: Plan
    rope: RopeLengths
    """Lengths between which the target's RoPE changes."""
    longest: int
    """The most tokens that a sample has, or can have once it is answered."""
    answered: bool
    """True if the directory holds these prompts with their answers, all of them."""

    @property
    def answers_first(self) -> bool:
        """True if the plan is one of prompts, which the capture answers."""
        return _answers_first(self.options)

    @property
    def shared(self) -> list[int]:
        """First rows of context that each sample of the cache has from the one before; empty for none."""
        return self.index["shared"].to_pylist() if "shared" in self.index.column_names else []

    @property
    def layer_ids(self) -> tuple[int, ...]:
        return self.identity.features.layer_ids

    def check_directory(self) -> None:
        """Refuse a directory that holds another capture. The target's weights are not compared.

        Raises:
            CacheError: naming the fields that differ, or the change of RoPE that it was batched across.
        """
        if self.found is not None:
            target = replace(self.identity.target, weights=self.found.target.weights)
            refuse_another(self.options.cache, self.found, replace(self.identity, target=target))
            self._check_rope(self.found)

    def _check_rope(self, found: Identity) -> None:
        """Refuse a cache whose samples were batched across other lengths at which the RoPE changes."""
        ours, theirs = (identity.data.settings.get(ROPE) for identity in (self.identity, found))
        if ours != theirs:
            raise CacheError(
                f"{self.options.cache} was captured in other batches, and rows batched across a change of "
                f"the target's RoPE have wrong states (existing against requested: "
                f"{theirs or 'not regarded'} against {ours or 'not regarded'}): choose another --cache, or "
                "remove that directory"
            )

    def full_identity(self) -> Identity:
        """Return the identity with the hash of the target's weights, which reads all of them.

        Raises:
            TargetError: there are no weights.
        """
        return replace(self.identity, target=self.target.identity())


def existing(cache: Place) -> Manifest | None:
    """Return the manifest of a cache, complete or not; None without one. Raises CacheError, StoreError."""
    if isinstance(cache, Address):
        from pipeline.cache.remote.mirror import found_manifest
        from pipeline.remote.objects import Objects

        return found_manifest(Objects(cache))
    return read_manifest(cache) if (cache / MANIFEST).is_file() else None


def prepare(options: CaptureOptions) -> PreparedCapture:
    """Read the target's config, tokenise the data, and plan batches and shards.

    Raises:
        DSparkError: see `pipeline.errors`.
    """
    manifest = existing(options.cache)
    found = manifest.identity if manifest else None
    target = open_target(_with_dtype_of(found, with_example(options.target)))
    shape = target.identity(hash_weights=False)
    own_rope = rope_lengths(target.config, target.shell)
    check_engine(options.engine, target, own_rope)
    # Another engine reads quantised weights by its own rules, and has one set of frequencies for all lengths.
    in_process = options.engine.engine == HUGGING_FACE
    rope = own_rope if in_process else RopeLengths()
    if in_process or quantisation(target.config) is None:
        target.check_weights()
    layer_ids = options.layer_ids or default_layer_ids(shape.num_layers)
    layer_ids = tuple(validate_target_layer_ids(layer_ids, shape.num_layers))
    # A template that prints the date prints the day on which the capture began.
    prepared = prepare_data(options.data, target, found.data.settings.get("today") if found else None)
    data, template = prepared.samples, prepared.template
    facts = prompt_facts(data, options) if _answers_first(options) else data.facts
    target.check_length(max(int(data.facts.lengths.max()), int(facts.lengths.max())))
    longest = int(facts.lengths.max())
    batching, facts = _planned(data, facts, options, rope)
    index, plan = build_index(facts, batching.shards)
    date = {"today": template.today} if template.prints_the_date else {}
    # Earlier versions batched across such lengths: `_check_rope` refuses their caches.
    split = {ROPE: rope.describe()} if rope.matter(data.facts.lengths) else {}
    content, asked = facts.content_hash(), {}
    if _answers_first(options):
        asked = {ANSWERS: options.answers.settings()}
        content = hashlib.sha256(f"{content} {asked[ANSWERS]}".encode()).hexdigest()
        asked[PROMPTS] = content
    answered = found is not None and bool(asked) and found.data.settings.get(PROMPTS) == content
    answered = answered and found.data.sha256 != content
    identity = Identity(
        target=shape,
        tokenizer=prepared.tokenizer,
        data=DataIdentity(
            sources=tuple(source.name for source in prepared.sources),
            sha256=found.data.sha256 if found is not None and answered else content,
            settings=options.data.settings() | date | split | asked,
        ),
        features=_features(options, layer_ids),
        shard_tokens=options.shard_tokens,
        batch_tokens=options.batch_tokens,
        engine=engine_identity(options.engine, target),
    )
    return PreparedCapture(
        options, target, identity, found, data, batching, index, plan, rope, longest, answered
    )


def _planned(
    data: TokenizedData, facts: SampleFacts, options: CaptureOptions, rope: RopeLengths
) -> tuple[CapturePlan, SampleFacts]:
    """Return the plan, and the facts in its order."""
    if not options.share_prefixes:
        plan = plan_capture(facts.lengths, options.batch_tokens, options.shard_tokens, rope)
        return plan, facts.take(plan.order)
    limits = Limits(options.batch_tokens, options.shard_tokens, options.engine.is_plain)
    every, none = options.hidden == ALL_TOKENS, options.last_hidden == NO_LAST_HIDDEN
    last_rows = np.zeros_like(facts.lengths) if none else facts.lengths if every else facts.last_rows
    plan, shared = plan_sharing(data, last_rows, limits, rope)
    return plan, replace(facts.take(plan.order), shared=shared)


def _answers_first(options: CaptureOptions) -> bool:
    return options.answers.regenerate and options.engine.engine == VLLM


def prompt_facts(data: TokenizedData, options: CaptureOptions) -> SampleFacts:
    """Return the facts of the data's samples, with the most tokens and rows that they have once answered.

    Raises:
        DataError: one has no prompt.
    """
    samples = (_with_prompt(data[i]) for i in range(len(data)))
    lengths = longest_lengths(samples, options.data.max_length, options.answers.max_new_tokens)
    return replace(data.facts, lengths=lengths, last_rows=lengths)


def _with_prompt(sample: TokenizedSample) -> TokenizedSample:
    """Return a sample that can be answered. Raises DataError for another."""
    if sample.loss_mask[0]:
        raise DataError(
            f"row {sample.source_row + 1} of the data is supervised from its first token, so it has no "
            "prompt that --regenerate could answer: give conversations, or prompts with completions"
        )
    return sample


def _features(options: CaptureOptions, layer_ids: tuple[int, ...]) -> FeatureIdentity:
    """Return the states to store and their codecs."""
    return FeatureIdentity(
        layer_ids=layer_ids,
        context_codec=options.context_codec,
        last_codec=NO_LAST_HIDDEN if options.last_hidden == NO_LAST_HIDDEN else options.last_codec,
        last_hidden=options.last_hidden,
        hidden=options.hidden,
        prefixes=ONCE if options.share_prefixes else EACH,
    )


def _with_dtype_of(found: Identity | None, options: TargetOptions) -> TargetOptions:
    """Replace `--dtype auto` by the dtype of the existing cache, which another machine may have captured."""
    if found is not None and options.dtype == "auto" and found.target.dtype in DTYPES:
        return replace(options, dtype=found.target.dtype)
    return options
