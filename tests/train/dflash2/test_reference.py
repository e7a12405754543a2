"""DFlash2's states, losses, gradients and figures against a naive float64 loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.train.dflash import drafts as dflash_drafts
from tests.train.dflash.drafts import ANCHORS, MASKS
from tests.train.dflash2 import reference as dflash2_reference
from tests.train.dflash2.drafts import NEW, TOP, small_config, small_model
from tests.train.drafts import as_batch, as_pack, random_samples, sliding, spec_of
from train.draft.dflash2.model import Qwen3DFlash2Model
from train.draft.dflash2.module import DFlash2TrainerModule
from train.losses import chunks
from train.losses.slots import Objective, divide

# RoPE angles are fp32 in the draft by design, so float64 agreement ends here.
TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}
OBJECTIVES = {
    "decay": {"gamma": 3.0, "ce_alpha": 1.0, "l1_alpha": 0.0, "selector_alpha": 1.0, "smoothing": None},
    "D-PACE, L1": {"gamma": None, "ce_alpha": 0.3, "l1_alpha": 0.9, "selector_alpha": 0.7, "smoothing": 0.3},
    "selector off": {
        "gamma": 3.0,
        "ce_alpha": 1.0,
        "l1_alpha": 0.0,
        "selector_alpha": 0.0,
        "smoothing": None,
    },
}
SHAPES = {
    "two rows": {"block_size": 2},
    "three taps": {"conv_kernel_size": 3},
    "one tap, a group of all channels": {"conv_kernel_size": 1, "conv_group_size": 16},
    "one candidate": {"selector_top_k": 1},
    "all tokens are candidates": {"selector_top_k": 31},
    "softcap and scales": {"final_logit_softcapping": 2.0, "embedding_scale": 4.0, "logit_scale": 0.3},
    "a window in one layer": sliding(5, "sliding_attention", "full_attention"),
}
CASES = [
    *(pytest.param(as_pack, {}, name, id=name) for name in OBJECTIVES),
    pytest.param(as_batch, {}, "D-PACE, L1", id="padded rows"),
    *(pytest.param(as_pack, fields, "D-PACE, L1", id=name) for name, fields in SHAPES.items()),
]


def module_of(model, *, gamma, ce_alpha, l1_alpha, selector_alpha, smoothing) -> DFlash2TrainerModule:
    weights = {"ce": ce_alpha, "l1": l1_alpha, "selector": selector_alpha}
    return DFlash2TrainerModule(model, Objective(weights, gamma), smoothing)


@pytest.mark.parametrize(("layout", "fields", "objective"), CASES)
def test_losses_gradients_and_figures(monkeypatch, layout, fields: dict, objective: str) -> None:
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", 31 * 7)  # several chunks
    model, samples, settings = small_model(**fields), random_samples(MASKS), OBJECTIVES[objective]
    weights, spec, parameters = model.state_dict(keep_vars=True), spec_of(model), list(model.parameters())
    top = fields.get("selector_top_k", TOP)
    expected = dflash2_reference.loss(weights, spec, top, samples, ANCHORS, **settings)
    wanted = torch.autograd.grad(expected["loss"], parameters, allow_unused=True, materialize_grads=True)
    module = module_of(model, **settings)
    result = module(**layout(samples, ANCHORS), observe=True)
    result.loss.backward()
    torch.testing.assert_close(result.loss.double(), expected["loss"].detach(), **TOLERANCE)
    for name in ("ce", "l1", "selector"):
        found = result.sums.terms[name] / result.sums.weight
        torch.testing.assert_close(found.double(), expected[name].detach(), **TOLERANCE, msg=name)
    for name in ("accepted", "matches", "missed"):
        found = getattr(result.slots, name)
        assert not found.requires_grad
        torch.testing.assert_close(found.double(), torch.tensor(expected[name]).double(), **TOLERANCE)
    accepted = divide(result.sums, module.objective).accept_rate
    assert accepted.item() == pytest.approx(sum(expected["accepted"]) / len(expected["accepted"]), rel=2e-5)
    for (name, parameter), gradient in zip(model.named_parameters(), wanted, strict=True):
        scale = gradient.abs().max().item()
        off = settings["selector_alpha"] == 0 or top == 1  # one candidate is chosen whatever its score is
        assert (scale > 0) == (not (off and "selector" in name)), name
        torch.testing.assert_close(
            parameter.grad, gradient, rtol=1e-4, atol=max(1e-5 * scale, 1e-12), msg=name
        )


def test_the_cases_have_what_they_test() -> None:
    """Labels inside the list and outside, and choices that the selector changes."""
    model, samples = small_model(), random_samples(MASKS)
    slots = module_of(model, **OBJECTIVES["decay"])(**as_pack(samples, ANCHORS), observe=True).slots
    assert 0 < slots.missed.sum() < len(slots.missed)
    assert (slots.selector[slots.missed == 1] == 0).all()
    assert (slots.selector[slots.missed == 0] > 0).all()
    with torch.no_grad():
        model.candidate_selector.successor_codebook.zero_()
    without = module_of(model, **OBJECTIVES["decay"])(**as_pack(samples, ANCHORS)).slots
    assert (without.accepted - slots.accepted).abs().max() > 1e-2
    assert (without.selector - slots.selector)[slots.missed == 0].abs().min() > 1e-3


def test_a_missed_label_has_no_gradient_through_the_selector() -> None:
    model, samples = small_model(selector_top_k=2), random_samples(MASKS)
    slots = module_of(model, **OBJECTIVES["decay"])(**as_pack(samples, ANCHORS)).slots
    (slots.selector * slots.missed).sum().backward()
    assert slots.missed.sum() > 0
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert gradients
    assert all(not gradient.any() for gradient in gradients)


def test_without_a_teacher_there_is_no_acceptance() -> None:
    batch = as_pack(random_samples(MASKS), ANCHORS)
    del batch["target_last_hidden_states"]
    slots = module_of(small_model(), **OBJECTIVES["decay"])(**batch).slots
    assert slots.accepted is None
    assert slots.matches is None
    assert (slots.selector[slots.missed == 0] > 0).all()


def test_states_of_every_block() -> None:
    """The whole block's, beyond the end of its document too."""
    model, samples = small_model(conv_kernel_size=3), random_samples(MASKS)
    batch = as_pack(samples, ANCHORS)
    del batch["target_last_hidden_states"]
    blocks = model.draft_blocks(**batch)
    pairs = [(sample, a) for sample, own in zip(samples, ANCHORS, strict=True) for a in own]
    for (sample, anchor), hidden in zip(pairs, blocks.hidden[blocks.block_keep_mask], strict=True):
        rows = dflash2_reference.block_hidden(model.state_dict(), spec_of(model), sample, anchor)
        torch.testing.assert_close(hidden, torch.stack(rows[1:]), **TOLERANCE)


def test_a_fresh_draft_drafts_as_dflash_does() -> None:
    """The same states to the last bit, and scores that are DFlash's logits."""
    fresh = Qwen3DFlash2Model(small_config()).double()
    plain = dflash_drafts.small_model()
    missing, unexpected = fresh.load_state_dict(plain.state_dict(), strict=False)
    assert unexpected == []
    assert all(any(part in name for part in NEW) for name in missing)
    batch = as_pack(random_samples(MASKS), ANCHORS)
    del batch["target_last_hidden_states"]
    assert torch.equal(fresh.draft_blocks(**batch).hidden, plain.draft_blocks(**batch).hidden)
    state, tokens = torch.randn(3, 16, dtype=torch.float64), torch.arange(3)
    assert not fresh.candidate_selector(state, tokens, tokens[:, None]).any()


def broken(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """Break one thing as a mistake would."""
    from train.draft.dflash2 import layers, selector

    if part == "a tap reads on into the block before":

        def convolve(self, states: Tensor, corrections: Tensor, side: int) -> Tensor:
            weights = corrections.repeat_interleave(self.group, -1) + self.base_kernel[side]
            return weights[..., 0, :] * states + weights[..., 1, :] * states.roll(1, dims=1)

        monkeypatch.setattr(layers.BlockConvolution, "_convolve", convolve)
    elif part == "the output takes the input's corrections":
        right = layers.BlockConvolution._convolve
        taken: list[Tensor] = []

        def swapped(self, states: Tensor, corrections: Tensor, side: int) -> Tensor:
            taken[side:] = [corrections]
            return right(self, states, taken[0], side)

        monkeypatch.setattr(layers.BlockConvolution, "_convolve", swapped)
    else:
        right_scores = selector.CandidateSelector.forward
        monkeypatch.setattr(
            selector.CandidateSelector,
            "forward",
            lambda self, hidden, previous, ids: right_scores(self, hidden, previous.roll(1), ids),
        )


@pytest.mark.parametrize(
    "part",
    [
        "a tap reads on into the block before",
        "the output takes the input's corrections",
        "another slot's predecessor",
    ],
)
def test_a_mistake_is_seen(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    model, samples, settings = small_model(), random_samples(MASKS), OBJECTIVES["decay"]
    expected = dflash2_reference.loss(model.state_dict(), spec_of(model), TOP, samples, ANCHORS, **settings)
    broken(monkeypatch, part)
    loss = module_of(model, **settings)(**as_pack(samples, ANCHORS)).loss
    assert abs(loss.item() - expected["loss"].item()) > 1e-3


def test_micro_batches_share_one_denominator() -> None:
    samples, settings = random_samples(MASKS), OBJECTIVES["decay"]
    whole, halves = small_model(), small_model()
    expected = module_of(whole, **settings)(**as_batch(samples, ANCHORS))
    expected.loss.backward()
    total = 0.0
    for part in (slice(0, 1), slice(1, 4)):
        batch = as_batch(samples[part], ANCHORS[part])
        result = module_of(halves, **settings)(**batch, denominator=expected.sums.weight.detach())
        result.loss.backward()
        total += result.loss.item()
    assert total == pytest.approx(expected.loss.item(), rel=1e-6)
    for (name, one), other in zip(whole.named_parameters(), halves.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-8, msg=name)
