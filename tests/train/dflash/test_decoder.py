"""The draft with a cache drafts what its training forward predicts, whatever it drafted before."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.train.dflash.drafts import BLOCK, small_model
from tests.train.drafts import HIDDEN, LAYERS, VOCAB, sliding
from train.draft.blocks.decoder import BlockDecoder
from train.draft.dflash.model import Qwen3DFlashModel

S, SLOTS = 23, BLOCK - 1
KEPT = [1, 2, 3, 5, 8, 9, 11, 12, 15, 16, 17, 20, 21, 25, 28, 30]
CASES = {
    "plain": {},
    "scales": {"embedding_scale": 4.0, "final_logit_softcapping": 3.0, "logit_scale": 2.0},
    "window": sliding(6, "sliding_attention", "full_attention"),
    "reduced": {"draft_vocab_size": len(KEPT)},
}


def make_model(case: str) -> Qwen3DFlashModel:
    model = small_model(seed=3, **CASES[case]).eval()
    if case == "reduced":
        model.keep(torch.tensor(KEPT))
    return model


def sequence() -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids `[S]` and context features `[S, L*H]`."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCAB, (S,), generator=generator)
    return ids, torch.randn(S, LAYERS * HIDDEN, generator=generator, dtype=torch.float64)


def trained_forward(model: Qwen3DFlashModel, ids: torch.Tensor, context: torch.Tensor, anchor: int):
    """Logits `[K, V]` of the block at `anchor`, as in training; -inf outside the draft's vocabulary."""
    chosen = {"anchor_positions": torch.tensor([[anchor]]), "block_keep_mask": torch.tensor([[True]])}
    with torch.no_grad():
        blocks = model.draft_blocks(ids[None], context[None], torch.ones(1, len(ids)), **chosen)
        logits = model.draft_logits(blocks.hidden[0, 0])
    if model.kept is None:
        return logits
    return torch.full((SLOTS, VOCAB), -torch.inf, dtype=logits.dtype).index_copy_(1, model.kept, logits)


@pytest.mark.parametrize("case", CASES)
def test_it_drafts_what_the_training_forward_predicts(case: str) -> None:
    """Context comes in pieces of several sizes; behind each, the block is drafted and compared."""
    model, (ids, context) = make_model(case), sequence()
    decoder = BlockDecoder(model, capacity=6)  # which must grow
    assert (decoder.slots, decoder.has_confidence) == (SLOTS, False)
    for begin, end in itertools.pairwise([0, 0, 1, 5, 6, 8, 15]):
        decoder.extend(context[begin:end], ids[begin:end])
        logits = trained_forward(model, ids, context, end)
        drafted = decoder.draft(ids[end])
        assert drafted.probs is None
        assert drafted.tokens.tolist() == logits.argmax(-1).tolist()
        sampled = decoder.draft(ids[end], temperature=0.7, generator=torch.Generator().manual_seed(end))
        torch.testing.assert_close(sampled.probs, torch.softmax(logits / 0.7, -1), rtol=1e-9, atol=1e-12)
        assert (sampled.probs.gather(1, sampled.tokens[:, None]) > 0).all()


def test_after_rejections_it_is_a_fresh_decoder() -> None:
    """Rounds that keep none, some and all of what was drafted; nothing of a rejected block stays."""
    model, (ids, context) = make_model("window"), sequence()
    decoder, end = BlockDecoder(model, capacity=4), 2
    decoder.extend(context[:end])
    for accepted in (0, 2, SLOTS, 1, 0):
        decoder.draft(ids[end])
        begin, end = end, end + 1 + accepted
        decoder.extend(context[begin:end])
        fresh = BlockDecoder(model)
        fresh.extend(context[:end])
        assert decoder.length == fresh.length == end
        states = decoder.block_states(ids[end])
        assert states.shape == (SLOTS, HIDDEN)
        torch.testing.assert_close(states, fresh.block_states(ids[end]), rtol=1e-12, atol=1e-12)
        assert torch.equal(decoder.draft(ids[end]).tokens, fresh.draft(ids[end]).tokens)
    decoder.reset()
    decoder.extend(context[:3])
    fresh = BlockDecoder(model)
    fresh.extend(context[:3])
    assert torch.equal(decoder.block_states(7), fresh.block_states(7))


@pytest.mark.parametrize("case", ["plain", "reduced"])
def test_tokens_are_drawn_from_the_distribution_that_is_returned(case: str) -> None:
    """Slot after slot, as torch draws from it with the same generator."""
    model, (ids, context) = make_model(case), sequence()
    kept = torch.arange(VOCAB) if model.kept is None else model.kept
    decoder, seen = BlockDecoder(model), set()
    decoder.extend(context[:9])
    for seed in range(30):
        ours, theirs = (torch.Generator().manual_seed(seed) for _ in range(2))
        drafted = decoder.draft(ids[9], temperature=2.0, generator=ours)
        rows = drafted.probs[:, kept]
        torch.testing.assert_close(rows.sum(-1), torch.ones_like(rows[:, 0]))
        wanted = [kept[torch.multinomial(row, 1, generator=theirs)].item() for row in rows]
        assert drafted.tokens.tolist() == wanted
        seen.add(tuple(wanted))
    assert len(seen) > 3
