"""The draft with a cache drafts what its training forward predicts, whatever it drafted before."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.train.drafts import HIDDEN, LAYERS, VOCAB, sliding, small_model
from train.draft.dspark.decoder import DraftDecoder
from train.draft.dspark.markov import MARKOV_HEADS
from train.draft.dspark.model import Qwen3DSparkModel
from train.runtime.sampling import draw

HEADS = [*MARKOV_HEADS, "none"]
S = 23


def make_model(head: str, **overrides) -> Qwen3DSparkModel:
    values = {"markov_head_type": head, "block_size": 4, **overrides}
    if head == "none":
        values |= {"markov_rank": 0, "confidence_head_with_markov": False}
    return small_model(seed=3, **values).eval()


def trained_forward(model: Qwen3DSparkModel, ids: torch.Tensor, context: torch.Tensor, anchor: int):
    """Logits `[K, V]` and confidence logits `[K]` of the block at `anchor`, as in training."""
    out = model(
        ids[None],
        context[None],
        torch.ones(1, len(ids)),
        anchor_positions=torch.tensor([[anchor]]),
        block_keep_mask=torch.tensor([[True]]),
    )
    return out.draft_logits[0, 0], out.confidence_pred[0, 0]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(
    "scales", [{}, {"embedding_scale": 4.0, "final_logit_softcapping": 3.0, "logit_scale": 2.0}]
)
def test_it_drafts_what_the_training_forward_predicts(head: str, scales: dict) -> None:
    """Context comes in pieces of several sizes; behind each, the block is drafted greedily and compared."""
    model = make_model(head, **scales)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCAB, (S,), generator=generator)
    context = torch.randn(S, LAYERS * HIDDEN, generator=generator, dtype=torch.float64)
    decoder = DraftDecoder(model, capacity=6)  # which must grow
    for begin, end in itertools.pairwise([0, 5, 6, 8, 15]):
        decoder.extend(context[begin:end])
        drafted = decoder.draft(ids[end])
        assert len(drafted.tokens) == 4
        assert drafted.probs is None
        # With the drafted tokens as the sequence's own, the training forward predicts each of them.
        told = ids.clone()
        told[end + 1 : end + 5] = drafted.tokens
        logits, _ = trained_forward(model, told, context, end)
        assert drafted.tokens.tolist() == logits.argmax(-1).tolist()
        sampled = decoder.draft(ids[end], temperature=0.7, generator=torch.Generator().manual_seed(end))
        told[end + 1 : end + 5] = sampled.tokens
        logits, _ = trained_forward(model, told, context, end)
        torch.testing.assert_close(sampled.probs, torch.softmax(logits / 0.7, -1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("types", [(), ("full_attention", "sliding_attention")], ids=["all", "one layer"])
@pytest.mark.parametrize("window", [4, 7, 16])
def test_a_window_is_the_training_forwards(window: int, types: tuple[str, ...]) -> None:
    """Contexts shorter than the window, as long and longer; no logit may differ, as none may see more."""
    model = make_model("vanilla", **sliding(window, *types))
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCAB, (S,), generator=generator)
    context = torch.randn(S, LAYERS * HIDDEN, generator=generator, dtype=torch.float64)
    decoder, full = DraftDecoder(model, capacity=6), DraftDecoder(make_model("vanilla"))
    differ = []
    for end in range(1, S - 4):
        for each in (decoder, full):
            each.extend(context[end - 1 : end])
        sampled = decoder.draft(ids[end], temperature=0.7, generator=torch.Generator().manual_seed(end))
        told = ids.clone()
        told[end + 1 : end + 5] = sampled.tokens
        logits, _ = trained_forward(model, told, context, end)
        torch.testing.assert_close(sampled.probs, torch.softmax(logits / 0.7, -1), rtol=1e-9, atol=1e-12)
        differ.append(not torch.allclose(decoder.block_states(ids[end]), full.block_states(ids[end])))
    # The last slot is the first to lose a position: at anchor + 3 it sees those after anchor + 3 - window.
    assert differ == [end + 3 >= window for end in range(1, S - 4)]


@pytest.mark.parametrize("head", ["vanilla", "none"])
def test_the_threshold_cuts_where_the_confidence_says(head: str) -> None:
    model = make_model(head)
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(VOCAB, (S,), generator=generator)
    context = torch.randn(S, LAYERS * HIDDEN, generator=generator, dtype=torch.float64)
    temperatures = [0.5, 2.0, 1.0, 3.0]
    seen = set()
    for anchor in range(1, S - 4):
        decoder = DraftDecoder(model)
        decoder.extend(context[:anchor])
        whole = decoder.draft(ids[anchor]).tokens
        told = ids.clone()
        told[anchor + 1 : anchor + 5] = whole
        _, logits = trained_forward(model, told, context, anchor)
        reached = torch.sigmoid(logits / torch.tensor(temperatures)).cumprod(0)
        for threshold in (0.9, 0.4, 0.1):
            some = decoder.draft(
                ids[anchor], threshold=threshold, confidence_temperatures=temperatures
            ).tokens
            expected = int((reached >= threshold).sum())  # products only fall
            assert some.tolist() == whole[:expected].tolist()
            seen.add(expected)
    assert len(seen) > 2  # it did cut, and not always


def test_what_is_forgotten_is_forgotten() -> None:
    model = make_model("rnn")
    first, second = torch.randn(2, 9, LAYERS * HIDDEN, dtype=torch.float64)
    decoder, fresh = DraftDecoder(model), DraftDecoder(model)
    decoder.extend(first)
    decoder.draft(7)
    decoder.reset()
    for each in (decoder, fresh):
        each.extend(second[:4])
    assert decoder.length == 4
    torch.testing.assert_close(decoder.block_states(7), fresh.block_states(7))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_token_is_drawn_as_torch_draws_it(dtype: torch.dtype) -> None:
    for size in (1, 2, 7, 320):
        weights = torch.rand(size, generator=torch.Generator().manual_seed(size)).to(dtype)
        weights[: size // 3] = 0
        for seed in range(20):
            own, theirs = (torch.Generator().manual_seed(seed) for _ in range(2))
            assert draw(weights, own) == torch.multinomial(weights, 1, generator=theirs)[0]
            assert torch.equal(own.get_state(), theirs.get_state())
