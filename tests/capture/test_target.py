"""The wrappers around a hooked target; every family's parity is in test_families.py."""

from __future__ import annotations

import warnings
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, T5Config, T5ForConditionalGeneration

import capture
from capture.dflash import DFlashTargetBatch, HFDFlashTargetModel
from capture.target import DSparkTargetBatch, HFDSparkTargetModel
from pipeline.errors import TargetError
from pipeline.hooks import final_logit_softcapping, tap_states

H, V = 32, 97
COMMON = {
    "vocab_size": V,
    "hidden_size": H,
    "intermediate_size": 48,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
FAMILIES = {
    "llama": {},
    "qwen3": {},
    "gemma2": {"sliding_window": 4, "final_logit_softcapping": 3.0},
    "gemma3_text": {"sliding_window": 4},
    "gpt2": {},
    "gpt_neox": {},
    "mixtral": {"num_local_experts": 4},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": H},
}
LENGTHS = (11, 7, 1, 5)


def make_model(family: str, dtype: torch.dtype = torch.float32, **overrides) -> nn.Module:
    torch.manual_seed(3)
    config = AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family], **overrides})
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    return {family: make_model(family) for family in FAMILIES}


def make_batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded ids, attention mask and an arbitrary loss mask; padding is a real token id."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, V, (len(LENGTHS), max(LENGTHS)), generator=generator)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        mask[row, :length] = 1
    loss_mask = torch.randint(0, 2, ids.shape, generator=generator)
    return ids, mask, loss_mask


def every_id(model: nn.Module) -> list[int]:
    return list(range(-1, model.config.num_hidden_layers))


def wrap(kind: type, model: nn.Module, ids: list[int]):
    """The wrapper, whose warning about ids that SGLang can't serve is not what is tested here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*SGLang")
        return kind(model, ids)


def hf_forward(model: nn.Module, ids: Tensor, mask: Tensor):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)


def hook_count(model: nn.Module) -> int:
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, name)) for module in model.modules() for name in names)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_id_is_hf_hidden_state(models, family):
    model, (ids, mask, loss_mask) = models[family], make_batch()
    expected = hf_forward(model, ids, mask).hidden_states
    assert len(expected) == 6
    batch = wrap(HFDSparkTargetModel, model, every_id(model)).generate_batch(ids, mask, loss_mask)
    blocks = batch.target_hidden_states.split(H, dim=-1)
    assert len(blocks) == len(expected)
    for layer_id, block in zip(every_id(model), blocks, strict=True):
        assert torch.equal(block, expected[layer_id + 1]), f"layer {layer_id}"
    # Neighbouring states differ, so a layer off by one could not have passed.
    assert all(not torch.allclose(a, b, atol=1e-3) for a, b in pairwise(blocks))


@pytest.mark.parametrize("family", FAMILIES)
def test_dflash_context_is_the_same_and_nothing_else_is_captured(models, family):
    model, (ids, mask, loss_mask) = models[family], make_batch()
    expected = hf_forward(model, ids, mask).hidden_states
    batch = wrap(HFDFlashTargetModel, model, [-1, 0, 3, 4]).generate_batch(ids, mask, loss_mask)
    wanted = torch.cat([expected[0], expected[1], expected[4], expected[5]], dim=-1)
    assert torch.equal(batch.hidden_states, wanted)
    assert batch.input_ids is ids
    assert batch.attention_mask is mask
    assert batch.loss_mask is loss_mask
    assert set(vars(batch)) == {"hidden_states", "input_ids", "attention_mask", "loss_mask"}


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mixtral"])
def test_what_padding_holds_does_not_matter(models, family):
    model, (ids, mask, loss_mask) = models[family], make_batch(2)
    other = torch.where(mask.bool(), ids, (ids + 31) % V)
    assert not torch.equal(ids, other)
    target = HFDSparkTargetModel(model, [0, 2])
    one = target.generate_batch(ids, mask, loss_mask).target_hidden_states[mask.bool()]
    two = target.generate_batch(other, mask, loss_mask).target_hidden_states[mask.bool()]
    torch.testing.assert_close(one, two, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shape_dtype_device_and_passed_through_tensors(dtype):
    model, (ids, mask, loss_mask) = make_model("qwen3", dtype), make_batch()
    batch = HFDSparkTargetModel(model, [0, 2, 3]).generate_batch(ids, mask, loss_mask)
    assert isinstance(batch, DSparkTargetBatch)
    assert batch.target_hidden_states.shape == (4, 11, 3 * H)
    assert batch.target_last_hidden_states.shape == (4, 11, H)
    for states in (batch.target_hidden_states, batch.target_last_hidden_states):
        assert states.dtype == dtype
        assert states.device == ids.device
    assert batch.input_ids is ids
    assert batch.loss_mask is loss_mask


@pytest.mark.parametrize("kind", [HFDSparkTargetModel, HFDFlashTargetModel])
def test_outputs_are_detached_and_usable_in_autograd(models, kind):
    batch = kind(models["llama"], [0, 2]).generate_batch(*make_batch())
    states = [value for name, value in vars(batch).items() if "hidden_states" in name]
    assert states
    for state in states:
        assert not state.requires_grad
        assert state.grad_fn is None
        layer = nn.Linear(state.shape[-1], 1)  # inference tensors would refuse to be saved for backward
        layer(state).square().sum().backward()
        assert layer.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in models["llama"].parameters())


def test_tapped_states_are_detached_where_gradients_flow(models):
    model, (ids, mask, _) = models["llama"], make_batch()
    assert torch.is_grad_enabled()
    before = hook_count(model)  # Hugging Face's own output_hidden_states may have left some
    with tap_states(model, [-1, 0, 4]) as states:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert logits.requires_grad
    assert set(states) == {-1, 0, 4, "last_hidden"}
    assert not any(state.requires_grad for state in states.values())
    assert hook_count(model) == before


def test_later_forwards_leave_captured_states_alone(models):
    target = HFDSparkTargetModel(models["llama"], [0, 2])
    first = target.generate_batch(*make_batch(0))
    kept = first.target_hidden_states.clone()
    target.generate_batch(*make_batch(1))
    assert torch.equal(first.target_hidden_states, kept)


@pytest.mark.parametrize("kind", [HFDSparkTargetModel, HFDFlashTargetModel])
def test_hooks_are_removed_after_success(models, kind):
    model = models["gpt2"]
    before = hook_count(model)
    target = wrap(kind, model, every_id(model))
    assert hook_count(model) == before
    target.generate_batch(*make_batch())
    assert hook_count(model) == before


@pytest.mark.parametrize("kind", [HFDSparkTargetModel, HFDFlashTargetModel])
def test_hooks_are_removed_after_an_error_inside_forward(kind):
    model = make_model("qwen3")
    target = wrap(kind, model, every_id(model))

    def fail(*_):
        raise RuntimeError("no more memory")

    handle = model.model.layers[2].mlp.register_forward_hook(fail)
    during = hook_count(model)
    with pytest.raises(RuntimeError, match="no more memory"):
        target.generate_batch(*make_batch())
    assert hook_count(model) == during
    handle.remove()
    assert hook_count(model) == 0
    target.generate_batch(*make_batch())


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox", "opt"])
@pytest.mark.parametrize("kind", [HFDSparkTargetModel, HFDFlashTargetModel])
def test_the_head_is_never_run(family, kind):
    model = make_model(family)

    def fail(*_):
        raise AssertionError("lm_head was called")

    model.get_output_embeddings().register_forward_pre_hook(fail)
    kind(model, [0, 3]).generate_batch(*make_batch())
    with pytest.raises(AssertionError, match="lm_head was called"):
        model(make_batch()[0])


@pytest.mark.parametrize("kind", [HFDSparkTargetModel, HFDFlashTargetModel])
def test_dropout_is_off_even_if_the_model_was_training(kind):
    model = make_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5).train()
    target = kind(model, [0, 3])
    assert not model.training
    one, two = target.generate_batch(*make_batch()), target.generate_batch(*make_batch())
    name = "target_hidden_states" if kind is HFDSparkTargetModel else "hidden_states"
    assert torch.equal(getattr(one, name), getattr(two, name))


def test_arguments_by_position_and_by_name(models):
    model, (ids, mask, loss_mask) = models["llama"], make_batch()
    for kind, name in ((HFDSparkTargetModel, "target_hidden_states"), (HFDFlashTargetModel, "hidden_states")):
        by_position = kind(model, [0, 2]).generate_batch(ids, mask, loss_mask)
        by_name = kind(model=model, target_layer_ids=(0, 2)).generate_batch(
            loss_mask=loss_mask, attention_mask=mask, input_ids=ids
        )
        assert torch.equal(getattr(by_position, name), getattr(by_name, name))
    a, b, c, d = (torch.full((1,), float(i)) for i in range(4))
    spark = DSparkTargetBatch(a, b, c, d)
    assert spark == DSparkTargetBatch(
        target_hidden_states=a, target_last_hidden_states=b, input_ids=c, loss_mask=d
    )
    flash = DFlashTargetBatch(a, b, c, d)
    assert flash == DFlashTargetBatch(hidden_states=a, input_ids=b, attention_mask=c, loss_mask=d)


def test_the_package_exports_the_same_names():
    assert capture.HFDSparkTargetModel is HFDSparkTargetModel
    assert capture.DSparkTargetBatch is DSparkTargetBatch
    assert capture.HFDFlashTargetModel is HFDFlashTargetModel
    assert capture.DFlashTargetBatch is DFlashTargetBatch


@pytest.mark.parametrize(
    "layer_ids", [[], [5], [0, 9], [-2, 1], [1, 1], [2, 1], [0.5], ["1"], [True], [None]], ids=str
)
@pytest.mark.parametrize("kind", [HFDSparkTargetModel, HFDFlashTargetModel])
def test_bad_layer_ids_are_value_errors(models, kind, layer_ids):
    with pytest.raises(ValueError, match="layer id"):
        kind(models["llama"], layer_ids)


@pytest.mark.parametrize("layer_ids", [[-1, 2], [0, 4]])
def test_ids_that_sglang_cannot_serve_warn(models, layer_ids):
    with pytest.warns(UserWarning, match="SGLang"):
        HFDSparkTargetModel(models["llama"], layer_ids)


def test_accessors(models):
    model = models["llama"]
    target = HFDSparkTargetModel(model, (0, 3))
    assert target.target_layer_ids == [0, 3]
    assert target._num_layers == 5
    assert target._inner_model() is model.model
    assert target._get_final_norm() is model.model.norm
    layers = target._get_transformer_layers()
    assert isinstance(layers, list)
    assert all(a is b for a, b in zip(layers, model.model.layers, strict=True))
    assert target.get_input_embeddings() is model.model.embed_tokens
    assert target.get_output_embeddings() is model.lm_head
    flash = HFDFlashTargetModel(model, [0, 3])
    assert flash._get_transformer_layers() == layers
    assert flash._validate_layer_ids((1, 2)) == [1, 2]
    assert flash.get_input_embeddings() is model.model.embed_tokens


@pytest.mark.parametrize(("family", "cap"), [("gemma2", 3.0), ("gemma3_text", None), ("llama", None)])
def test_final_logit_softcapping(models, family, cap):
    assert final_logit_softcapping(models[family]) == cap


def test_gemma2_without_a_softcap_has_none():
    assert final_logit_softcapping(make_model("gemma2", final_logit_softcapping=None)) is None


def test_a_bare_decoder_is_a_target_too(models):
    model, (ids, mask, loss_mask) = models["llama"], make_batch()
    whole = HFDSparkTargetModel(model, [0, 2]).generate_batch(ids, mask, loss_mask)
    bare = HFDSparkTargetModel(model.model, [0, 2]).generate_batch(ids, mask, loss_mask)
    assert torch.equal(whole.target_hidden_states, bare.target_hidden_states)
    assert torch.equal(whole.target_last_hidden_states, bare.target_last_hidden_states)


def test_encoder_decoders_and_strangers_are_refused_by_name():
    tiny = T5Config(vocab_size=V, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(TargetError, match=r"T5ForConditionalGeneration.*encoder-decoder"):
        HFDSparkTargetModel(T5ForConditionalGeneration(tiny), [0])
    with pytest.raises(TargetError, match="Linear"):
        HFDSparkTargetModel(nn.Linear(2, 2), [0])
