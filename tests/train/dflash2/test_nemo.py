"""DFlash2 against NVIDIA NeMo-Automodel's modules with equal weights, where that package is installed.

As in the test of DFlash it is given our anchors, in samples whose blocks are all whole.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.train.dflash.drafts import BLOCK
from tests.train.dflash2.drafts import OWN, small_config, small_model
from tests.train.drafts import HIDDEN, VOCAB, sliding
from train.draft.dflash2.decoder import SelectingDecoder
from train.draft.dflash2.model import Qwen3DFlash2Model
from train.draft.dflash2.module import DFlash2TrainerModule
from train.losses.slots import Objective

core = pytest.importorskip("nemo_automodel.components.speculative.dflash.dflash2_core")
draft_qwen3 = pytest.importorskip("nemo_automodel.components.speculative.dflash.draft_qwen3_dflash2")
test_nemo = pytest.importorskip("tests.train.dflash.test_nemo")

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
SHARED = ("embed_tokens.weight", "lm_head.weight")
FIELDS = [pytest.param({}, id="full"), pytest.param(sliding(5) | {"conv_kernel_size": 3}, id="window")]


def their_draft(model: Qwen3DFlash2Model) -> nn.Module:
    """Their draft with the weights of ours."""
    config = small_config(**model.config.to_dict())
    names = ("mask_token_id", "target_layer_ids", "block_size", *OWN)
    config.dflash_config = {name: getattr(config, name) for name in names}
    config._attn_implementation = "sdpa"
    draft = draft_qwen3.Qwen3DFlash2DraftModel(config).float()
    own = {name: weight for name, weight in model.state_dict().items() if name not in SHARED}
    draft.load_state_dict(own, strict=True)
    return draft


def theirs(model: Qwen3DFlash2Model, batch: dict[str, Tensor], gamma: float | None, alpha: float):
    """Their module with the weights of a draft of ours, and our anchors."""
    embed, head = nn.Embedding(VOCAB, HIDDEN), nn.Linear(HIDDEN, VOCAB, bias=False)
    embed.weight, head.weight = (nn.Parameter(model.state_dict()[n].clone()) for n in SHARED)
    module = core.DFlash2TrainerModule(
        their_draft(model),
        head,
        embed,
        model.config.mask_token_id,
        BLOCK,
        attention_backend="sdpa",
        loss_decay_gamma=gamma,
        selector_loss_weight=alpha,
        sliding_window=model.windows[0],
    )
    chosen = batch["anchor_positions"], batch["block_keep_mask"]
    module._sample_anchor_positions = lambda *_args, **_kwargs: chosen
    return module


@pytest.mark.parametrize("fields", FIELDS)
def test_states_and_scores(fields: dict) -> None:
    """Every row of every block but the anchors', and every candidate's score, to 1e-5 in fp32."""
    model, batch = small_model(**fields).float(), test_nemo.samples()
    module, given = theirs(model, batch, None, 1.0), test_nemo.arguments(batch)
    hidden = given.pop("hidden_states")
    _, _, noise, positions, mask, _ = module._prepare_block_inputs(**given)
    states = module.draft_model(
        position_ids=positions, attention_mask=mask, noise_embedding=noise, target_hidden=hidden
    )
    expected = states.unflatten(1, (-1, BLOCK))[:, :, 1:]
    blocks = model.draft_blocks(**batch)
    torch.testing.assert_close(blocks.hidden, expected, **CLOSE)
    logits = module.draft_model.compute_logits(expected, module.lm_head)
    tokens = batch["input_ids"][0][batch["anchor_positions"][..., None] + torch.arange(BLOCK)]
    scores, ids, _, _ = module._selector_scores(expected, logits, tokens)
    best, candidates = model.draft_logits(blocks.hidden).topk(model.config.selector_top_k)
    assert torch.equal(candidates, ids)
    ours = best + model.candidate_selector(blocks.hidden, tokens[..., :-1], candidates)
    torch.testing.assert_close(ours, scores, **CLOSE)


@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("gamma", [3.0, None])
def test_losses_and_gradients(fields: dict, gamma: float | None) -> None:
    """Their selector's loss is a mean over the slots whose label is a candidate, ours over all slots."""
    model, batch = small_model(**fields).float(), test_nemo.samples()
    ours = DFlash2TrainerModule(model, Objective({"ce": 1.0, "selector": 0.7}, gamma))(**batch)
    ours.loss.backward()
    weights = ours.slots.supervised.weights(gamma)
    share = float((weights * (1 - ours.slots.missed)).sum() / weights.sum())
    assert 0.1 < share < 0.9
    module = theirs(model, batch, gamma, 0.7 * share)
    expected = module(**test_nemo.arguments(batch))
    expected.loss.backward()
    torch.testing.assert_close(ours.loss, expected.loss, **CLOSE)
    assert 1 - float(ours.slots.missed.mean()) == pytest.approx(float(expected.candidate_recall))
    gradients = {name: parameter.grad for name, parameter in module.draft_model.named_parameters()}
    gradients["embed_tokens.weight"] = module.embed_tokens.weight.grad
    gradients["lm_head.weight"] = module.lm_head.weight.grad
    found = dict(model.named_parameters())
    assert gradients.keys() == found.keys()
    for name, wanted in gradients.items():
        scale = max(1.0, float(wanted.abs().max()))
        torch.testing.assert_close(found[name].grad, wanted, rtol=1e-5, atol=1e-5 * scale, msg=name)


def test_the_walk_while_decoding() -> None:
    """From our decoder's states: the same path, and the same probabilities of a sampled one."""
    model = small_model(seed=3).float().eval()
    selector, generator = their_draft(model).candidate_selector, torch.Generator().manual_seed(0)
    decoder, paths = SelectingDecoder(model), set()
    for anchor in range(8):
        decoder.reset()
        decoder.extend(torch.randn(5, model.fc.in_features, generator=generator))
        hidden = decoder.block_states(anchor)[None]
        logits = model.draft_logits(hidden)
        path, ids, _ = selector.walk(hidden, logits, torch.tensor([anchor]), 0.0)
        drafted = decoder.draft(anchor)
        assert drafted.tokens.tolist() == path[0].tolist()
        sampled = decoder.draft(anchor, 0.7, generator=generator)
        previous = torch.tensor([anchor, *sampled.tokens[:-1]])
        scores = selector.pair_scores(hidden[0], logits[0].gather(1, ids[0]), ids[0], previous)
        wanted = torch.zeros_like(logits[0]).scatter(1, ids[0], torch.softmax(scores / 0.7, -1))
        torch.testing.assert_close(sampled.probs, wanted, **CLOSE)
        paths.add(tuple(drafted.tokens.tolist()) != tuple(logits[0].argmax(-1).tolist()))
    assert True in paths, "the selector never changed a token"
