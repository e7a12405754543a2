"""Speculative decoding changes nothing but the time: token by token when greedy, in distribution when not."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline.errors import TargetError
from tests.train.live import FAMILIES, H, V, make_draft, make_target
from train.decode import rejection
from train.decode.speculative import decode_plain, decode_speculative
from train.decode.target import CachedTarget
from train.draft import DRAFTS
from train.draft.dspark.decoder import DraftDecoder
from train.draft.kind import Decoder

FEW = 3  # tokens of a vocabulary whose texts can be enumerated


class Oracle:
    """A decoder that drafts what it was told the target will say, with a mistake every few tokens."""

    def __init__(self, decoder: Decoder, text: list[int], every: int):
        self.own, self.text, self.every = decoder, text, every
        self.slots, self.has_confidence = decoder.slots, decoder.has_confidence
        self.length = 0

    def reset(self) -> None:
        self.own.reset()
        self.length = 0

    def extend(self, features: Tensor, tokens: Tensor) -> None:
        self.own.extend(features, tokens)
        known = self.text[self.length :][: len(tokens)]
        assert tokens.tolist()[: len(known)] == known, "these are not the text's tokens"
        self.length += len(tokens)

    def draft(self, anchor, temperature=0.0, **_):
        drafted = self.own.draft(anchor, temperature)
        known = self.text[self.length + 1 :][: len(drafted.tokens)]
        for i, token in enumerate(known):
            wrong = (self.length + i) % self.every == 0
            drafted.tokens[i] = (token + wrong) % V
        return drafted


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_is_the_targets_own(family: str) -> None:
    """Against transformers' generate, for drafts that are mostly wrong, mostly right and always right."""
    model = make_target(family)
    layer_ids = [0, 2]
    draft = make_draft(model, layer_ids)
    generator = torch.Generator().manual_seed(5)
    with CachedTarget(model, layer_ids) as target:
        for length, every in [(1, 3), (7, 4), (20, 1000), (12, 2)]:
            prompt = torch.randint(V, (length,), generator=generator).tolist()
            own = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, length, dtype=torch.long),
                max_new_tokens=30,
                do_sample=False,
            )[0].tolist()
            assert prompt + decode_plain(target, prompt, 30).tokens == own
            for decoder in (DraftDecoder(draft), Oracle(DraftDecoder(draft), own, every)):
                decoded = decode_speculative(target, decoder, prompt, 30)
                assert prompt + decoded.tokens == own
                assert decoded.rounds <= 29
            assert decoded.rounds < 24, "the told draft was hardly ever accepted"
            if every == 1000:
                assert decoded.rounds == 6  # 29 tokens after the first, five a round


def test_it_ends_where_the_target_ends() -> None:
    model = make_target()
    draft = make_draft(model, [1, 2])
    with CachedTarget(model, [1, 2]) as target:
        own = decode_plain(target, [5, 6, 7], 40).tokens
        for stop in {own[0], own[3], own[11]}:
            stops = frozenset({stop})
            expected = own[: own.index(stop) + 1]
            assert decode_plain(target, [5, 6, 7], 40, stop=stops).tokens == expected
            for decoder in (DraftDecoder(draft), Oracle(DraftDecoder(draft), [5, 6, 7, *own], 1000)):
                decoded = decode_speculative(target, decoder, [5, 6, 7], 40, stop=stops)
                assert decoded.tokens == expected
                assert sum(decoded.accepted) + decoded.rounds >= len(expected) - 1
        for most in (1, 2, 3, 7):
            assert decode_speculative(target, DraftDecoder(draft), [5, 6, 7], most).tokens == own[:most]


def test_what_is_counted() -> None:
    """An always right draft with K = 4 and 12 tokens: 1 + 5 + 5 + 5, four of which nobody asked for."""
    model = make_target()
    draft = make_draft(model, [1, 2])
    with CachedTarget(model, [1, 2]) as target:
        own = decode_plain(target, [5, 6, 7], 40).tokens
        decoded = decode_speculative(
            target, Oracle(DraftDecoder(draft), [5, 6, 7, *own], 1000), [5, 6, 7], 12
        )
        assert decoded.tokens == own[:12]
        assert (decoded.rounds, decoded.verified, decoded.emitted) == (3, 12, 15)
        assert decoded.tried == decoded.accepted == [3, 3, 3, 3]
        # Wrong where length + slot is a multiple of 3: blocks at 3, 4, 7, 10 and 13 accept 0, 2, 2, 2, 2.
        decoded = decode_speculative(target, Oracle(DraftDecoder(draft), [5, 6, 7, *own], 3), [5, 6, 7], 12)
        assert decoded.tokens == own[:12]
        assert (decoded.rounds, decoded.emitted) == (5, 13)
        assert decoded.tried == [5, 4, 4, 0]
        assert decoded.accepted == [4, 4, 0, 0]
        stop = frozenset({own[2]})  # the second drafted one, unless it came before
        if own.index(own[2]) == 2:
            decoded = decode_speculative(
                target, Oracle(DraftDecoder(draft), [5, 6, 7, *own], 1000), [5, 6, 7], 12, stop=stop
            )
            assert (decoded.rounds, decoded.tried) == (1, [1, 1, 0, 0])


def test_the_features_it_feeds_the_draft_are_those_of_one_forward() -> None:
    """After any number of rounds the draft's cache is that of the whole text, computed at once."""
    model = make_target()
    draft = make_draft(model, [0, 3])
    prompt = [3, 1, 4, 1, 5]
    with CachedTarget(model, [0, 3]) as target:
        decoder = DraftDecoder(draft)
        decode_speculative(target, decoder, [9, 8, 7, 6], 9)  # which is to be forgotten
        tokens = prompt + decode_speculative(target, decoder, prompt, 17).tokens
        own = prompt + decode_plain(target, prompt, 30).tokens
        assert tokens == own[: len(tokens)]
        oracle = Oracle(DraftDecoder(draft), own, 3)
        decode_speculative(target, oracle, prompt, 17)
        with torch.no_grad():
            states = model(torch.tensor([own]), output_hidden_states=True).hidden_states
        fresh = DraftDecoder(draft)
        fresh.extend(torch.cat([states[1][0], states[4][0]], -1))  # the last layer's is the post-norm one
        for decoded in (decoder, oracle.own):
            known = decoded.length
            assert known >= len(tokens) - 1
            # Norms and rotations of the target are fp32 inside.
            own_cache, wanted = decoded._cache[..., :known, :], fresh._cache[..., :known, :]
            torch.testing.assert_close(own_cache, wanted, rtol=1e-4, atol=1e-5)


def test_longrope_switches_where_the_text_grows_beyond_its_limit() -> None:
    """Each position has logits and features of the text up to it, run at once by a fresh forward."""
    model = make_target("phi3")
    text = torch.randint(V, (26,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = [model(text[None, : n + 1], use_cache=False, output_hidden_states=True) for n in range(26)]
    with CachedTarget(model, [0, 2]) as target:
        start = 9
        target.forward(text[:start], 1)
        # Blocks across the limit and up to it, and back from beyond.
        for tokens, back in ((5, 3), (9, 6), (3, 1), (1, 0), (1, 0), (4, 2), (4, 0)):
            logits, features = target.forward(text[start : start + tokens], tokens)
            assert (len(logits), len(features)) == (tokens, tokens)
            for i in range(tokens):
                alone = whole[start + i]
                own = torch.cat([alone.hidden_states[layer][0, -1] for layer in (1, 3)])
                torch.testing.assert_close(logits[i], alone.logits[0, -1], rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(features[i], own, rtol=1e-4, atol=1e-4)
            target.take_back(back)
            start += tokens - back


# A right rule gives counts less likely than this once in 100,000 seeds.
UNLIKELY = 1e-5


def chi_square_p(counts: Tensor, probs: Tensor) -> float:
    """How likely counts at least this far off are; outcomes expected fewer than 5 times are put together."""
    expected = probs * counts.sum()
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]]).double()
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]]).double()
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    degrees = torch.tensor((len(counts) - 1) / 2, dtype=torch.float64)
    return torch.special.gammaincc(degrees, statistic / 2).item()


def sequence_probs(model: nn.Module, temperature: float) -> Tensor:
    """The probability of every continuation of four tokens, by one forward each."""
    probs = []
    for tokens in itertools.product(range(FEW), repeat=4):
        with torch.no_grad():
            logits = model(torch.tensor([[1, 2, *tokens]])).logits[0, 1:-1]
        rows = torch.softmax(logits / temperature, -1)
        probs.append(rows[torch.arange(4), torch.tensor(tokens)].prod())
    return torch.stack(probs)


def sampled(target: CachedTarget, decoder: DraftDecoder, samples: int, **options) -> Tensor:
    """How often each continuation came out."""
    counts = torch.zeros(FEW**4)
    generator = torch.Generator().manual_seed(11)
    for _ in range(samples):
        tokens = decode_speculative(target, decoder, [1, 2], 4, generator=generator, **options).tokens
        counts[sum(token * FEW**i for i, token in enumerate(reversed(tokens)))] += 1
    return counts


# Kinds of draft: the whole vocabulary, or the numbers of the tokens that are kept of three.
CASES = {
    "dspark": ("dspark", None),
    "dflash": ("dflash", None),
    "dflash, reduced": ("dflash", [0, 2]),
    "dflash2": ("dflash2", None),
    "eagle3": ("eagle3", None),
    "eagle3, reduced": ("eagle3", [0, 2]),
}


@pytest.fixture(scope="module")
def few() -> nn.Module:
    """A target of three tokens."""
    return make_target(vocab=FEW, num_hidden_layers=2)


@pytest.fixture(scope="module")
def far(few) -> dict[str, Decoder]:
    """Decoders of random drafts of two slots that like what the target does not, so that wrong rules show."""
    decoders = {}
    for case, (kind, kept) in CASES.items():
        draft = make_draft(few, [0], kind, slots=2, kept=kept)
        with torch.no_grad():
            draft.lm_head.weight.neg_()
        decoders[case] = DRAFTS[kind].decoder(draft)
    return decoders


def test_every_kind_has_a_case() -> None:
    assert {kind for kind, _ in CASES.values()} == set(DRAFTS)


@pytest.mark.parametrize("case", CASES)
def test_samples_have_the_targets_distribution(few, far, case: str) -> None:
    """Four tokens: one of the prompt's forward, then rounds of two drafted ones and what follows them."""
    with CachedTarget(few, [0]) as target:
        counts = sampled(target, far[case], 400, temperature=0.8)
    assert chi_square_p(counts, sequence_probs(few, 0.8)) > UNLIKELY


@pytest.mark.parametrize("case", CASES)
def test_greedy_text_of_fifty_prompts_is_the_targets_own(case: str) -> None:
    """Against transformers' generate, of drafts that are mostly wrong and mostly right by turns."""
    model, (kind, kept) = make_target(), CASES[case]
    decoder = DRAFTS[kind].decoder(make_draft(model, [0, 2], kind, kept=kept and list(range(3, V, 2))))
    generator = torch.Generator().manual_seed(2)
    prompts = torch.randint(V, (50, 5), generator=generator)
    own = model.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=10, do_sample=False
    ).tolist()
    rounds = []
    with CachedTarget(model, [0, 2]) as target:
        for number, (prompt, text) in enumerate(zip(prompts.tolist(), own, strict=True)):
            each = Oracle(decoder, text, 3) if number % 2 else decoder
            decoded = decode_speculative(target, each, prompt, 10)
            assert prompt + decoded.tokens == text
            rounds.append(decoded.rounds)
    assert max(rounds[1::2]) < min(rounds[::2])


def test_a_threshold_keeps_the_distribution_and_saves_verification(few, far) -> None:
    options = {"temperature": 1.0, "threshold": 0.5, "confidence_temperatures": [0.05, 0.05]}
    with CachedTarget(few, [0]) as target:
        decoder = far["dspark"]
        counts = sampled(target, decoder, 400, **options)
        assert chi_square_p(counts, sequence_probs(few, 1.0)) > UNLIKELY
        generator = torch.Generator().manual_seed(0)
        rounds = [
            decode_speculative(target, decoder, [1, 2], 4, generator=generator, **options) for _ in range(30)
        ]
    drafted = {(decoded.verified, decoded.rounds) for decoded in rounds}
    assert len(drafted) > 2, "the threshold never cut, or always"


@pytest.mark.parametrize("case", CASES)
def test_the_chi_square_test_sees_a_wrong_rule(few, far, case, monkeypatch: pytest.MonkeyPatch) -> None:
    def accept_all(drafted, draft_probs, target_logits, temperature, generator=None):
        return len(drafted), rejection.choose(target_logits[-1], temperature, generator)

    monkeypatch.setattr("train.decode.speculative.accept", accept_all)
    with CachedTarget(few, [0]) as target:
        counts = sampled(target, far[case], 150, temperature=0.8)
    assert chi_square_p(counts, sequence_probs(few, 0.8)) < UNLIKELY


def test_the_rule_itself_over_many_samples() -> None:
    """One drafted token from p, verified against q: the first token out is distributed as q."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 6, generator=generator, dtype=torch.float64) * 2
    draft_probs = torch.softmax(torch.randn(6, generator=generator, dtype=torch.float64) * 2, -1)
    counts, accepted = torch.zeros(6), 0
    for _ in range(6000):
        token = torch.multinomial(draft_probs, 1, generator=generator)
        count, following = rejection.accept(token, draft_probs[None], logits, 1.0, generator)
        counts[token[0] if count else following] += 1
        accepted += count
    target_probs = torch.softmax(logits[0], -1)
    assert chi_square_p(counts, target_probs) > UNLIKELY
    # And as many are accepted as the offline figures say: 1 minus the total variation.
    expected = 1 - (target_probs - draft_probs).abs().sum().item() / 2
    assert accepted / 6000 == pytest.approx(expected, abs=0.025)


def test_the_rule_behind_an_accepted_token() -> None:
    """Two drafted tokens of different distributions: behind an accepted one comes what the target says.

    So is a replacement of the second one: what is left of its own distribution, not of the first one's.
    """
    generator = torch.Generator().manual_seed(0)

    def random_probs() -> Tensor:
        return torch.softmax(2 * torch.randn(6, generator=generator, dtype=torch.float64), -1)

    logits = 2 * torch.randn(3, 6, generator=generator, dtype=torch.float64)
    draft_probs = torch.stack([random_probs(), random_probs()])
    counts = torch.zeros(6)
    for _ in range(6000):
        tokens = torch.multinomial(draft_probs, 1, generator=generator)[:, 0]
        count, following = rejection.accept(tokens, draft_probs, logits, 1.0, generator)
        if count > 0:
            counts[tokens[1] if count == 2 else following] += 1
    assert counts.sum() > 1000
    assert chi_square_p(counts, torch.softmax(logits[1], -1)) > UNLIKELY


def test_a_target_that_gives_no_numbers_is_refused() -> None:
    model = make_target()
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with CachedTarget(model, []) as target, pytest.raises(TargetError, match="not finite"):
        decode_plain(target, [1, 2], 4)


def test_recurrent_targets_are_refused() -> None:
    config = AutoConfig.for_model(
        "qwen3_next", vocab_size=V, hidden_size=H, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
        moe_intermediate_size=16, shared_expert_intermediate_size=16, linear_num_key_heads=2,
        linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(TargetError, match="recurrent state"):
        CachedTarget(model, [0])


def test_the_hooks_are_gone_afterwards() -> None:
    model = make_target()
    with CachedTarget(model, [0, 1]) as target:
        target.forward(torch.tensor([1, 2]), 1)
        assert any(module._forward_hooks for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
