"""The draft with a cache drafts what its training forward predicts, whatever it drafted before."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tests.train.dflash.drafts import BLOCK
from tests.train.dflash.test_decoder import sequence
from tests.train.dflash2.drafts import small_model
from tests.train.drafts import sliding
from train.draft.dflash2.decoder import SelectingDecoder
from train.draft.dflash2.model import Qwen3DFlash2Model

SLOTS = BLOCK - 1
CASES = {
    "plain": {},
    "three taps": {"conv_kernel_size": 3},
    "scales": {"embedding_scale": 4.0, "final_logit_softcapping": 3.0, "logit_scale": 2.0},
    "window": sliding(6, "sliding_attention", "full_attention"),
}


def scores(model: Qwen3DFlash2Model, ids: Tensor, context: Tensor, anchor: int, path: list[int]) -> Tensor:
    """Scores `[K, V]` of a block as in training, each slot after the path's token; -inf of no candidates."""
    chosen = {"anchor_positions": torch.tensor([[anchor]]), "block_keep_mask": torch.tensor([[True]])}
    hidden = model.draft_blocks(ids[None], context[None], torch.ones(1, len(ids)), **chosen).hidden[0, 0]
    logits = hidden @ model.lm_head.weight.T * model.logit_scale
    if model.softcap is not None:
        logits = model.softcap * torch.tanh(logits / model.softcap)
    own = model.candidate_selector
    previous = torch.tensor([int(ids[anchor]), *path[:-1]])
    gates = own.predecessor_codebook[previous] * (hidden @ own.hidden_projection.weight.T)
    kept = logits >= logits.sort(-1).values[:, -model.config.selector_top_k, None]
    return (logits + gates @ own.successor_codebook.T).masked_fill(~kept, -torch.inf)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_it_drafts_what_the_training_forward_predicts(case: str) -> None:
    """Context comes in pieces of several sizes; after each, the block is drafted and compared."""
    model, (ids, context) = small_model(seed=3, **CASES[case]).eval(), sequence()
    decoder, changed = SelectingDecoder(model, capacity=6), 0  # which must grow
    assert (decoder.slots, decoder.has_confidence) == (SLOTS, False)
    for begin, end in itertools.pairwise([0, 0, 1, 5, 6, 8, 15]):
        decoder.extend(context[begin:end], ids[begin:end])
        drafted = decoder.draft(ids[end])
        assert drafted.probs is None
        path = drafted.tokens.tolist()
        assert scores(model, ids, context, end, path).argmax(-1).tolist() == path
        changed += model.draft_logits(decoder.block_states(ids[end])).argmax(-1).tolist() != path
        sampled = decoder.draft(ids[end], temperature=0.7, generator=torch.Generator().manual_seed(end))
        wanted = torch.softmax(scores(model, ids, context, end, sampled.tokens.tolist()) / 0.7, -1)
        torch.testing.assert_close(sampled.probs, wanted, rtol=1e-9, atol=1e-12)
        assert (sampled.probs.gather(1, sampled.tokens[:, None]) > 0).all()
    assert changed, "the selector never changed a token"


@torch.no_grad()
def test_tokens_are_drawn_from_the_distribution_that_is_returned() -> None:
    """Slot after slot, as torch draws from the candidates with the same generator."""
    model, (ids, context) = small_model(seed=3).eval(), sequence()
    decoder, seen = SelectingDecoder(model), set()
    decoder.extend(context[:9])
    candidates = model.draft_logits(decoder.block_states(ids[9])).topk(model.config.selector_top_k).indices
    for seed in range(30):
        ours, theirs = (torch.Generator().manual_seed(seed) for _ in range(2))
        drafted = decoder.draft(ids[9], temperature=2.0, generator=ours)
        torch.testing.assert_close(drafted.probs.sum(-1), torch.ones_like(drafted.probs[:, 0]))
        rows = zip(drafted.probs, candidates, strict=True)
        wanted = [own[torch.multinomial(row[own], 1, generator=theirs)].item() for row, own in rows]
        assert drafted.tokens.tolist() == wanted
        seen.add(tuple(wanted))
    assert len(seen) > 3
