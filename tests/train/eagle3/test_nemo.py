"""EAGLE-3 against NVIDIA NeMo-Automodel's modules with equal weights, where that package is installed.

It computes every row of a pack at every step, ours the chains of anchors. It shifts tokens and teachers by
one position before the module. Its loss is a weighted mean over steps of each step's mean, so that a step's
sum is found as a difference of two unrolls.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PretrainedConfig

from tests.train.eagle3.drafts import HIDDEN, LAYERS, STEPS, VOCAB, small_model
from train.draft.eagle3.module import Eagle3TrainerModule
from train.losses.slots import Objective

core = pytest.importorskip("nemo_automodel.components.speculative.eagle.core")
draft_llama = pytest.importorskip("nemo_automodel.components.speculative.eagle.draft_llama")

KEPT = [1, 2, 3, 5, 8, 9, 11, 12, 15, 16, 17, 20, 21, 25, 28, 30]
LENGTHS = (9, 6, 5)  # documents of a pack
DECAY = 0.8
CASES = [
    pytest.param(None, {}, id="whole"),
    pytest.param(KEPT, {}, id="reduced"),
    pytest.param(KEPT, {"fc_norm": True, "norm_output": True}, id="3.1"),
]


def samples() -> dict[str, Tensor]:
    """A pack without padding, whose tokens are all supervised."""
    generator, total = torch.Generator().manual_seed(5), sum(LENGTHS)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "input_ids": torch.randint(VOCAB, (1, total), generator=generator),
        "target_hidden_states": normal(1, total, LAYERS * HIDDEN),
        "loss_mask": torch.ones(1, total),
        "target_last_hidden_states": normal(1, total, HIDDEN),
        "document_ids": torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))[None],
    }


def theirs(model, steps: int):
    """Their module with the weights of a draft of ours."""
    config = model.config
    own = PretrainedConfig(
        **{name: getattr(config, name) for name in ("hidden_size", "vocab_size", "intermediate_size")},
        **{
            name: getattr(config, name) for name in ("num_attention_heads", "num_key_value_heads", "head_dim")
        },
        **{name: getattr(config, name) for name in ("rms_norm_eps", "hidden_act", "draft_vocab_size")},
        **{name: getattr(config, name) for name in ("target_hidden_size", "num_aux_hidden_states")},
        **{name: getattr(config, name) for name in ("fc_norm", "norm_output", "max_position_embeddings")},
        rope_parameters=config.rope_parameters,
        pad_token_id=None,
    )
    draft = draft_llama.LlamaEagle3DraftModel(own).float()
    names = {"midlayer.": "model.layers.0.", "lm_head.": "lm_head.", "d2t": "d2t", "t2d": "t2d"}
    weights = {}
    for name, value in model.state_dict().items():
        start = next((each for each in names if name.startswith(each)), None)
        weights[f"model.{name}" if start is None else names[start] + name.removeprefix(start)] = value
    missing = draft.load_state_dict(weights, strict=True)
    assert not missing.missing_keys
    kept = torch.arange(VOCAB) if model.kept is None else model.kept
    inside = torch.zeros(VOCAB, dtype=torch.bool).index_fill_(0, kept, True)
    module = core.Eagle3TrainerModule(
        draft, selected_token_ids=kept, selected_token_mask=inside, ttt_steps=steps
    )
    return module, kept


def arguments(model, batch: dict[str, Tensor], kept: Tensor) -> dict[str, Tensor]:
    """A pack as their module takes it: row t has the token at t + 1 and the teacher of the token at t + 2."""
    teacher = batch["target_last_hidden_states"] @ model.target_head.T
    probs = teacher.index_select(-1, kept).softmax(-1).roll(-1, dims=1)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    left = torch.cat([torch.arange(length - 2, -2, -1) for length in LENGTHS])[None]  # labels still to come
    return {
        "input_ids": batch["input_ids"].roll(-1, dims=1),
        "attention_mask": torch.ones_like(batch["input_ids"]),
        "loss_mask": torch.ones_like(batch["input_ids"]),
        "aux_hidden_states": batch["target_hidden_states"],
        "target_probs": probs,
        "position_mask": torch.ones(1, sum(LENGTHS), 1, dtype=torch.bool),
        "position_ids": positions,
        "seq_lens": torch.tensor([LENGTHS]),
        "doc_remaining": left.clamp(min=0),
    }


def renamed(name: str) -> str:
    return name.removeprefix("model.").replace("layers.0.", "midlayer.")


@pytest.mark.parametrize(("kept", "own"), CASES)
def test_states_and_logits_of_each_step(kept: list[int] | None, own: dict) -> None:
    """Every chain whose label is in its document, to 1e-5 in fp32."""
    model, batch = small_model(kept, **own).float(), samples()
    module, ids = theirs(model, STEPS)
    given, draft, cache = arguments(model, batch, ids), module.draft_model, [[], []]
    hidden, tokens, logits = draft.project_hidden_states(given["aux_hidden_states"]), given["input_ids"], []
    for _ in range(STEPS):
        packed = {"position_ids": given["position_ids"], "seq_lens": given["seq_lens"]}
        hidden = draft(tokens, hidden, given["attention_mask"], cache_hidden=cache, **packed)
        logits.append(draft.compute_logits(hidden)[0])
        tokens = torch.cat([tokens[:, 1:], torch.zeros_like(tokens[:, :1])], dim=1)
    blocks = model.draft_blocks(**{k: v for k, v in batch.items() if k != "target_last_hidden_states"})
    found, compared = model.draft_logits(blocks.hidden)[0], 0
    for anchor, step in blocks.eval_mask[0].nonzero().tolist():
        expected = logits[step][anchor - 1]
        torch.testing.assert_close(found[anchor, step], expected, atol=1e-5, rtol=1e-5)
        compared += 1
    # A document of T tokens has T - 2 - k anchors with a label for step k.
    assert compared == sum(max(0, length - 2 - k) for length in LENGTHS for k in range(STEPS))


@pytest.mark.parametrize(("kept", "own"), CASES)
def test_losses_and_gradients_of_each_step(kept: list[int] | None, own: dict) -> None:
    """The sum of each step's loss, and its gradient in every weight, through differences of unrolls."""
    model, batch = small_model(kept, **own).float(), samples()
    module, ids = theirs(model, 1)
    given = arguments(model, batch, ids)
    draft = module.draft_model
    draft.freeze_embeddings()
    own_before: dict[str, Tensor] = {}
    their_before: dict[str, Tensor] = {}
    objective = Objective({"soft_ce": 1.0}, -1 / torch.tensor(DECAY).double().log().item())
    for steps in range(1, STEPS + 1):
        model.zero_grad()
        draft.zero_grad()
        model.slots = module.ttt_steps = steps
        ours = Eagle3TrainerModule(model, objective).train()(**batch, denominator=torch.ones(()))
        ours.loss.backward()
        expected = module(**given)
        weight = sum(DECAY**k for k in range(steps))
        (expected.loss * weight).backward()
        gradients = {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
        gradients["loss"] = ours.loss.detach().double()
        others = {renamed(n): p.grad.double() for n, p in draft.named_parameters() if p.grad is not None}
        others["loss"] = expected.loss.detach().double() * weight
        assert gradients.keys() == others.keys()
        assert len(others) > 12
        count = int(ours.sums.slots[steps - 1])
        assert count == sum(max(0, length - 1 - steps) for length in LENGTHS)
        for name, value in others.items():
            theirs_now = count * (value - their_before.get(name, 0))
            ours_now = gradients[name] - own_before.get(name, 0)
            scale = float(theirs_now.abs().max())
            torch.testing.assert_close(ours_now, theirs_now, atol=1e-5 * max(scale, 1), rtol=1e-5, msg=name)
        own_before, their_before = gradients, others
