"""Rounds, acceptance and differences against our own decoding, and against lists worked out by hand."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from pipeline.errors import RunError
from tests.train.live import V, make_draft, make_target
from train.decode.benchmark import Pair
from train.decode.speculative import decode_plain, decode_speculative
from train.decode.target import CachedTarget
from train.draft import DRAFTS
from train.draft.kind import Decoder
from train.prove.compare import Proof, Round, check, compare, follow, format_proof
from train.prove.engine import Answer

LAYERS = [0, 2]
FACTS = {
    **{"target": "t", "draft": "d", "step": 7, "dtype": "float32", "max_new_tokens": 20},
    **{"promised": 1.5, "speculated": None},
}


def test_rounds_follow_the_text() -> None:
    """By hand: two of three accepted, then none, then one that the text's end cuts off."""
    text = [10, 11, 12, 13, 14, 15, 16]
    drafts = [[11, 12, 99], [0, 0, 0], [15, 16, 17], [1, 2, 3]]
    rounds = follow(text, drafts)
    assert rounds == [Round(0, [11, 12, 99]), Round(3, [0, 0, 0]), Round(4, [15, 16, 17])]


@dataclass
class Logged:
    """A decoder that writes its drafts down."""

    own: Decoder

    def __post_init__(self) -> None:
        self.slots, self.reset, self.extend = self.own.slots, self.own.reset, self.own.extend
        self.drafts: list[list[int]] = []

    def draft(self, *args, **kwargs):
        drafted = self.own.draft(*args, **kwargs)
        self.drafts.append(drafted.tokens.tolist())
        return drafted


@pytest.fixture(scope="module", params=list(DRAFTS))
def served(request: pytest.FixtureRequest) -> tuple[Pair, list[list[int]], Answer, Answer]:
    """A pair, prompts, and the answers of an engine that does what `decode_speculative` does."""
    model = make_target()
    draft = make_draft(model, LAYERS, request.param)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(V, (length,), generator=generator).tolist() for length in (1, 6, 11)]
    plain, texts, drafts = [], [], []
    with CachedTarget(model, LAYERS) as target:
        for prompt in prompts:
            plain.append(decode_plain(target, prompt, 20).tokens)
            decoder = Logged(DRAFTS[request.param].decoder(draft))
            texts.append(decode_speculative(target, decoder, prompt, 20).tokens)
            drafts.append(decoder.drafts)
    own = DRAFTS[request.param].decoder(draft)
    pair = Pair("t", model, None, draft, own, frozenset(), 7, None)
    return pair, prompts, Answer("engine 1", plain, [], 1.0), Answer("engine 1", texts, drafts, 2.0)


def test_an_engine_that_does_as_we_do_holds(served) -> None:
    pair, prompts, plain, answer = served
    proof = compare(pair, prompts, plain, answer, **FACTS)
    assert proof.holds
    check(proof)
    rounds = sum(map(len, answer.drafts))
    assert (proof.rounds, proof.drafted) == (rounds, rounds * pair.decoder.slots)
    assert (proof.same, proof.same_texts, proof.agreeing, proof.tokens) == (proof.drafted, 3, 60, 60)
    # 57 tokens come from rounds; the first of each text from its prompt.
    assert proof.tokens_per_round == pytest.approx(57 / rounds)
    assert proof.tried[0] == rounds
    assert (proof.plain_ms, proof.draft_ms) == (pytest.approx(1000 / 60), pytest.approx(2000 / 60))
    text = format_proof(proof)
    assert f"{proof.same:,} of {proof.drafted:,} in {rounds:,} rounds are ours" in text
    assert "3 of 3 are the engine's own without the draft; 60 of 60" in text


def test_one_other_drafted_token_is_found(served) -> None:
    """In the last slot of a round whose first slot is refused, so that no acceptance changes."""
    pair, prompts, plain, answer = served
    drafts = [[list(one) for one in own] for own in answer.drafts]
    drafts[1][2][-1] = (drafts[1][2][-1] + 1) % V
    proof = compare(pair, prompts, plain, replace(answer, drafts=drafts), **FACTS)
    assert not proof.holds
    assert proof.same == proof.drafted - 1
    found = proof.draft_difference
    assert found is not None
    assert (found.prompt, found.engine, found.ours) == (1, drafts[1][2], answer.drafts[1][2])
    assert proof.accepted == compare(pair, prompts, plain, answer, **FACTS).accepted
    with pytest.raises(RunError, match=r"or fewer \([\d,]+ of [\d,]+ are ours\), first in prompt 2 after"):
        check(proof)
    check(replace(proof, dtype="bfloat16"))


def test_fewer_drafted_tokens_are_found(served) -> None:
    """Each of them is ours, but an engine that drafts one of K has misread K."""
    pair, prompts, plain, answer = served
    drafts = [[one[:1] for one in own] for own in answer.drafts]
    # The rounds are those of the whole drafts only where no second token was accepted: the first.
    proof = compare(pair, prompts, plain, replace(answer, drafts=[own[:1] for own in drafts]), **FACTS)
    assert proof.same == proof.drafted == 3
    assert not proof.holds
    with pytest.raises(RunError, match="or fewer"):
        check(proof)


def test_another_text_is_found(served) -> None:
    pair, prompts, plain, answer = served
    texts = [list(text) for text in plain.texts]
    texts[2][5] = (texts[2][5] + 1) % V
    proof = compare(pair, prompts, replace(plain, texts=texts), answer, **FACTS)
    assert proof.same_texts == 2
    with pytest.raises(RunError, match=r"another greedy text with the draft .* prompt 3 at token 6"):
        check(proof)


def test_an_engine_that_drafts_nothing_proves_nothing(served) -> None:
    pair, prompts, plain, answer = served
    proof = compare(pair, prompts, plain, replace(answer, drafts=[[], [], []]), **FACTS)
    assert proof.tokens_per_round is None
    with pytest.raises(RunError, match="drafted nothing"):
        check(proof)


def test_acceptance_by_slot() -> None:
    """By hand, of a proof over one text of seven tokens: see `test_rounds_follow_the_text`."""

    class Told:
        slots = 3

        def reset(self) -> None: ...

        def extend(self, features, tokens) -> None: ...

        def draft(self, anchor):
            class Drafted:
                tokens = torch.tensor([0, 0, 0])

            return Drafted

    model = make_target()
    pair = Pair("t", model, None, make_draft(model, LAYERS), Told(), frozenset(), 1, None)  # type: ignore[arg-type]
    text = [10, 11, 12, 13, 14, 15, 16]
    answer = Answer("e", [text], [[[11, 12, 99], [0, 0, 0], [15, 16, 17]]], 1.0)
    proof: Proof = compare(pair, [[1]], answer, answer, **FACTS)
    assert proof.tried == [3, 2, 1]
    assert proof.accepted == [2, 2, 0]
    assert proof.tokens_per_round == 2.0  # six tokens in three rounds
    assert proof.same == 3
