"""DFlash against NVIDIA NeMo-Automodel's modules with equal weights, where that package is installed.

It draws its own anchors, of which it keeps those with a whole block. Here it is given ours, in samples
whose blocks are all whole, so that both supervise the same slots.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.train.dflash.drafts import BLOCK, small_config, small_model
from tests.train.drafts import HIDDEN, LAYERS, VOCAB, sliding
from train.draft.dflash.model import Qwen3DFlashModel
from train.draft.dflash.module import DFlashTrainerModule
from train.losses.slots import Objective

core = pytest.importorskip("nemo_automodel.components.speculative.dflash.core")
draft_qwen3 = pytest.importorskip("nemo_automodel.components.speculative.dflash.draft_qwen3")

LENGTHS = (9, 6, 8)  # documents of a pack
ANCHORS = [0, 2, 5, 10, 11, 15, 17, 19]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
FIELDS = [pytest.param({}, id="full"), pytest.param(sliding(5), id="window")]


def samples() -> dict[str, Tensor]:
    """A pack without padding, whose tokens are all supervised, and its blocks, all whole."""
    generator, total = torch.Generator().manual_seed(5), sum(LENGTHS)
    return {
        "input_ids": torch.randint(VOCAB, (1, total), generator=generator),
        "target_hidden_states": torch.randn(1, total, LAYERS * HIDDEN, generator=generator),
        "loss_mask": torch.ones(1, total),
        "document_ids": torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))[None],
        "anchor_positions": torch.tensor([[*ANCHORS, 0]]),  # a dummy last
        "block_keep_mask": torch.tensor([[True] * len(ANCHORS) + [False]]),
    }


def theirs(model: Qwen3DFlashModel, batch: dict[str, Tensor], gamma: float | None):
    """Their module with the weights of a draft of ours, and our anchors."""
    config = small_config(**model.config.to_dict())
    own = {"mask_token_id": config.mask_token_id, "target_layer_ids": config.target_layer_ids}
    config.dflash_config = own | {"block_size": BLOCK}
    config._attn_implementation = "sdpa"
    draft = draft_qwen3.Qwen3DFlashDraftModel(config).float()
    shared = {"embed_tokens.weight", "lm_head.weight"}
    draft.load_state_dict({n: v for n, v in model.state_dict().items() if n not in shared}, strict=True)
    embed, head = nn.Embedding(VOCAB, HIDDEN), nn.Linear(HIDDEN, VOCAB, bias=False)
    embed.weight, head.weight = (nn.Parameter(model.state_dict()[n].clone()) for n in sorted(shared))
    module = core.DFlashTrainerModule(
        draft,
        head,
        embed,
        config.mask_token_id,
        BLOCK,
        attention_backend="sdpa",
        loss_decay_gamma=gamma,
        sliding_window=model.windows[0],
    )
    chosen = batch["anchor_positions"], batch["block_keep_mask"]
    module._sample_anchor_positions = lambda *_args, **_kwargs: chosen
    return module


def arguments(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A pack as their module takes it."""
    return {
        "input_ids": batch["input_ids"],
        "hidden_states": batch["target_hidden_states"],
        "loss_mask": batch["loss_mask"],
        "position_ids": torch.cat([torch.arange(length) for length in LENGTHS])[None],
        "seq_lens": torch.tensor([LENGTHS]),
        "doc_remaining": torch.cat([torch.arange(length).flip(0) for length in LENGTHS])[None],
    }


@pytest.mark.parametrize("fields", FIELDS)
def test_states_and_logits(fields: dict) -> None:
    """Every row of every block but the anchors', the dummy's included, to 1e-5 in fp32."""
    model, batch = small_model(**fields).float(), samples()
    module, given = theirs(model, batch, None), arguments(batch)
    hidden = given.pop("hidden_states")
    _, _, noise, positions, mask, _ = module._prepare_block_inputs(**given)
    states = module.draft_model(
        position_ids=positions, attention_mask=mask, noise_embedding=noise, target_hidden=hidden
    )
    expected = states.unflatten(1, (-1, BLOCK))[:, :, 1:]
    blocks = model.draft_blocks(**batch)
    assert blocks.eval_mask.sum() == len(ANCHORS) * (BLOCK - 1)
    torch.testing.assert_close(blocks.hidden, expected, **CLOSE)
    logits = module.draft_model.compute_logits(expected, module.lm_head)
    torch.testing.assert_close(model.draft_logits(blocks.hidden), logits, **CLOSE)


@pytest.mark.parametrize("fields", FIELDS)
@pytest.mark.parametrize("gamma", [3.0, None])
def test_losses_and_gradients(fields: dict, gamma: float | None) -> None:
    model, batch = small_model(**fields).float(), samples()
    module = theirs(model, batch, gamma)
    expected = module(**arguments(batch))
    expected.loss.backward()
    ours = DFlashTrainerModule(model, Objective({"ce": 1.0, "l1": 0.0}, gamma))(**batch)
    ours.loss.backward()
    torch.testing.assert_close(ours.loss, expected.loss, **CLOSE)
    torch.testing.assert_close(ours.sums.weight, expected.loss_weight, **CLOSE)
    assert int(ours.sums.slots.sum()) == int(expected.valid_tokens)
    gradients = {name: parameter.grad for name, parameter in module.draft_model.named_parameters()}
    gradients["embed_tokens.weight"] = module.embed_tokens.weight.grad
    gradients["lm_head.weight"] = module.lm_head.weight.grad
    found = dict(model.named_parameters())
    assert gradients.keys() == found.keys()
    for name, wanted in gradients.items():
        scale = max(1.0, float(wanted.abs().max()))
        torch.testing.assert_close(found[name].grad, wanted, rtol=1e-5, atol=1e-5 * scale, msg=name)
