"""What a block sees, by perturbation: change what it must not see and nothing moves."""

from __future__ import annotations

import pytest
import torch

from tests.train.drafts import BLOCK, as_batch, random_samples, sliding, small_model
from train.draft.blocks.masks import block_attention_mask

LENGTH, ANCHORS = 10, [[0, 3, 6, 8]]


@pytest.fixture(scope="module")
def model():
    return small_model()


def _hidden(model, batch) -> torch.Tensor:
    blocks = model.draft_blocks(**{k: v for k, v in batch.items() if k != "target_last_hidden_states"})
    return blocks.hidden.detach()[0]  # [N, K, H]


@pytest.fixture
def batch():
    return as_batch(random_samples([[1] * LENGTH]), ANCHORS)


@pytest.mark.parametrize("position", range(LENGTH))
def test_context_is_seen_strictly_before_the_anchor(model, batch, position: int) -> None:
    before = _hidden(model, batch)
    batch["target_hidden_states"] = batch["target_hidden_states"].clone()
    batch["target_hidden_states"][0, position] += 1.0
    moved = (_hidden(model, batch) != before).flatten(1)
    for row, anchor in enumerate(ANCHORS[0]):
        assert bool(moved[row].any()) == (position < anchor)


@pytest.mark.parametrize("window", [3, 4, 6])
@pytest.mark.parametrize("position", range(LENGTH))
def test_a_window_counts_the_slots_own_position(batch, position: int, window: int) -> None:
    """Slot k, at anchor + k, sees the context after anchor + k - window: what engines compute.

    One layer, since through a second one a slot meets what its neighbours saw.
    """
    model = small_model(num_hidden_layers=1, **sliding(window, "sliding_attention"))
    before = _hidden(model, batch)
    batch["target_hidden_states"] = batch["target_hidden_states"].clone()
    batch["target_hidden_states"][0, position] += 1.0
    moved = (_hidden(model, batch) != before).any(-1)  # [N, K]
    for row, anchor in enumerate(ANCHORS[0]):
        seen = [position < anchor and position > anchor + slot - window for slot in range(BLOCK)]
        assert moved[row].tolist() == seen


@pytest.mark.parametrize("position", range(LENGTH))
def test_only_the_anchor_token_enters_a_block(model, batch, position: int) -> None:
    """The other slots are mask tokens: a label that leaked into its own block would move it."""
    before = _hidden(model, batch)
    batch["input_ids"] = batch["input_ids"].clone()
    batch["input_ids"][0, position] = (batch["input_ids"][0, position] + 1) % 31
    moved = (_hidden(model, batch) != before).flatten(1).any(dim=1)
    assert moved.tolist() == [anchor == position for anchor in ANCHORS[0]]


def test_every_slot_sees_every_slot_of_its_block_only(model, batch) -> None:
    noise = torch.randn(1, len(ANCHORS[0]) * BLOCK, model.config.hidden_size, dtype=torch.float64)
    anchors = batch["anchor_positions"]
    before = model.hidden_states(noise, batch["target_hidden_states"], anchors).detach()
    for slot in range(noise.shape[1]):
        changed = noise.clone()
        changed[0, slot] += 1.0
        after = model.hidden_states(changed, batch["target_hidden_states"], anchors).detach()
        moved = (after != before)[0].any(dim=-1)  # [N, K]
        expected = torch.zeros_like(moved)
        expected[slot // BLOCK] = True
        assert torch.equal(moved, expected)


def test_rows_do_not_see_each_other_or_padding(model) -> None:
    samples = random_samples([[1] * 9, [1] * 5, [0, 1, 1, 1]])
    anchors = [[2, 5], [0, 3], [1]]
    together = model(**as_batch(samples, anchors))
    for row in range(3):
        alone = model(**as_batch(samples[row : row + 1], anchors[row : row + 1]))
        mask = alone.eval_mask[0]
        torch.testing.assert_close(
            together.draft_logits[row, : len(mask)][mask], alone.draft_logits[0][mask], rtol=1e-6, atol=1e-6
        )


def test_no_row_of_the_mask_is_empty_and_dummies_give_no_nan(model) -> None:
    batch = as_batch(random_samples([[1] * 6, [0, 0, 0, 0, 1, 1]]), [[0, 1, 2], [4]])
    mask = block_attention_mask(batch["anchor_positions"], 6, BLOCK)
    assert mask.shape == (2, 1, 3 * BLOCK, 6 + 3 * BLOCK)
    assert bool(mask.any(dim=-1).all())
    outputs = model(**batch)
    assert torch.isfinite(outputs.draft_logits).all()
    assert torch.isfinite(outputs.aligned_target_logits).all()


def test_positions_restart_nowhere(model) -> None:
    """A block's scores depend on distances: shifting context and anchor together moves nothing else.

    RoPE is relative, so prepending unseen rows would move a result only through wrong position ids;
    here all of a block's context and slots are rotated by the same extra angle.
    """
    sample = random_samples([[1] * LENGTH])
    batch = as_batch(sample, [[6]])
    noise = torch.randn(1, BLOCK, model.config.hidden_size, dtype=torch.float64)
    plain = model.hidden_states(noise, batch["target_hidden_states"], torch.tensor([[6]])).detach()
    nearer = model.hidden_states(noise, batch["target_hidden_states"][:, 1:], torch.tensor([[5]])).detach()
    assert not torch.allclose(plain, nearer)  # one context row fewer is seen ...
    padded = torch.cat([batch["target_hidden_states"][:, :1] * 0 + 1e3, batch["target_hidden_states"]], dim=1)
    shifted = model.hidden_states(noise, padded[:, 1:], torch.tensor([[6]])).detach()
    torch.testing.assert_close(plain, shifted)  # ... and the same rows give the same block
