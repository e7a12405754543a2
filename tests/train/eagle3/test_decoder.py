"""Chain decoding against the unroll on the same tokens, slot by slot."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.train.eagle3.drafts import HIDDEN, LAYERS, STEPS, VOCAB, small_model
from train.draft.eagle3.decoder import ChainDecoder

KEPT = [1, 2, 3, 5, 8, 9, 11, 12, 15, 16, 17, 20, 21, 25, 28, 30]
LENGTH = 9


def context(seed: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(LENGTH + STEPS + 3, LAYERS * HIDDEN, generator=generator).double()
    return features, torch.randint(VOCAB, (len(features),), generator=generator)


def unrolled(model, features: Tensor, tokens: Tensor, anchor: int, drafted: Tensor) -> Tensor:
    """Logits `[K, Vd]` of the training forward whose tokens after the anchor are the drafted ones."""
    tokens = torch.cat([tokens[: anchor + 1], drafted])
    junk = torch.full((STEPS, features.shape[1]), 1e3).double()  # features of drafted tokens are not known
    states = torch.cat([features[:anchor], junk, junk[:1]])
    blocks = model.draft_blocks(
        tokens[None],
        states[None],
        torch.ones(1, len(tokens)),
        torch.tensor([[anchor]]),
        torch.tensor([[True]]),
    )
    return model.draft_logits(blocks.hidden[0, 0])


@pytest.mark.parametrize(
    "own",
    [{}, {"kept": KEPT}, {"fc_norm": True, "norm_output": True, "embedding_scale": 3.0, "logit_scale": 0.5}],
    ids=["plain", "reduced", "3.1"],
)
def test_drafts_are_those_of_the_unroll_on_them(own: dict) -> None:
    """Teacher-forced on its own drafted tokens, the unroll finds each of them the most likely."""
    model = small_model(**own)
    features, tokens = context()
    decoder = ChainDecoder(model, capacity=2)  # grows
    decoder.extend(features[:LENGTH], tokens[:LENGTH])
    drafted = decoder.draft(tokens[LENGTH]).tokens
    logits = unrolled(model, features, tokens, LENGTH, drafted)
    names = torch.arange(VOCAB) if model.kept is None else model.kept
    assert drafted.tolist() == names[logits.argmax(-1)].tolist()
    assert decoder.slots == len(drafted) == STEPS


@pytest.mark.parametrize("own", [{}, {"kept": KEPT}], ids=["plain", "reduced"])
def test_distributions_are_those_of_the_unroll(own: dict) -> None:
    """Of each slot over the whole vocabulary, at a temperature."""
    model = small_model(**own)
    features, tokens = context()
    decoder = ChainDecoder(model)
    decoder.extend(features[:LENGTH], tokens[:LENGTH])
    found = decoder.draft(tokens[LENGTH], 0.7, generator=torch.Generator().manual_seed(0))
    logits = unrolled(model, features, tokens, LENGTH, found.tokens)
    names = list(range(VOCAB)) if model.kept is None else model.kept.tolist()
    expected = torch.zeros(STEPS, VOCAB).double()
    expected[:, names] = (logits / 0.7).softmax(-1)
    torch.testing.assert_close(found.probs.double(), expected, atol=1e-6, rtol=1e-5)
    assert found.tokens.unique().numel() > 1
    assert (found.probs.gather(1, found.tokens[:, None]) > 0).all()


@pytest.mark.parametrize("accepted", range(STEPS + 1))
def test_after_a_rejection_it_is_a_fresh_decoder(accepted: int) -> None:
    """Drafted rows are taken back; the accepted ones get the target's features; whatever the pieces are."""
    model = small_model()
    features, tokens = context()
    used = ChainDecoder(model, capacity=4)
    used.extend(features[:LENGTH], tokens[:LENGTH])
    used.draft(tokens[LENGTH])
    used.draft((tokens[LENGTH] + 1) % VOCAB)  # another draft leaves nothing behind either
    end = LENGTH + accepted + 1
    used.extend(features[LENGTH:end], tokens[LENGTH:end])
    fresh = ChainDecoder(model, capacity=1)  # grows twice, the second time with rows to keep
    for piece in (slice(0, 1), slice(1, 3), slice(3, end)):
        fresh.extend(features[piece], tokens[piece])
    one, other = (
        each.draft(tokens[end], 0.9, generator=torch.Generator().manual_seed(1)) for each in (used, fresh)
    )
    assert one.tokens.tolist() == other.tokens.tolist()
    torch.testing.assert_close(one.probs, other.probs)
    logits = unrolled(model, features, tokens, end, one.tokens)
    torch.testing.assert_close(one.probs.double(), (logits / 0.9).softmax(-1), atol=1e-6, rtol=1e-5)


def test_what_is_forgotten_is_forgotten() -> None:
    model = small_model()
    (features, tokens), (others, more) = context(), context(4)
    decoder = ChainDecoder(model)
    decoder.extend(others, more)
    decoder.draft(1)
    decoder.reset()
    decoder.extend(features[:LENGTH], tokens[:LENGTH])
    fresh = ChainDecoder(model)
    fresh.extend(features[:LENGTH], tokens[:LENGTH])
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    one, other = (d.draft(5, 1.0, generator=g) for d, g in zip((decoder, fresh), generators, strict=True))
    assert torch.equal(one.probs, other.probs)
    assert not decoder.has_confidence
