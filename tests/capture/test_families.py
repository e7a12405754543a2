"""Parity with Hugging Face for every family: hooked states, teacher, padding, embedding scale.

A row of `FAMILIES` is what a tiny random model of that type needs beyond `COMMON`. The number of
families that pass is printed at the end of the test run.
"""

from __future__ import annotations

import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig

from capture.target import HFDSparkTargetModel
from pipeline.features import LayerIdWarning, head_logits
from pipeline.hooks import embedding_scale, final_logit_softcapping, learned_positions, logit_scale
from pipeline.target_model.load import auto_class

H, V, LAYERS = 32, 97, 4
COMMON: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": H,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
MOE = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
DEEPSEEK = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
TINY_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
QWEN_VISION = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": H}
MROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
# Every family that the project promises, then more that need little.
LISTED: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "mixtral": {"num_local_experts": 4},
    "qwen2": {},
    "qwen2_moe": {**MOE, "shared_expert_intermediate_size": 16},
    "qwen3": {},
    "qwen3_moe": MOE,
    "qwen3_next": {**MOE, **LINEAR, "shared_expert_intermediate_size": 16},
    "gemma": {},
    "gemma2": {**SLIDING, "final_logit_softcapping": 3.0},
    "gemma3_text": {**SLIDING, "final_logit_softcapping": 3.0},
    "gemma3": {
        "text_config": {**COMMON, **SLIDING},
        "vision_config": TINY_VISION,
        "mm_tokens_per_image": 4,
    },
    "phi3": {},
    "gpt_oss": {**SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {**DEEPSEEK, **MLA},
    "glm4": {},
    "glm4_moe": {**DEEPSEEK, "num_key_value_heads": 2},
    "olmo2": {},
    "olmo3": SLIDING,
    "smollm3": {},
    "granite": {"embedding_multiplier": 3.0, "logits_scaling": 2.0},
    "cohere2": {**SLIDING, "logit_scale": 0.25},
    "starcoder2": {},
    "stablelm": {},
    "gpt_neox": {},
    "gpt2": {},
    "falcon": {"head_dim": None},
}
MORE: dict[str, dict[str, Any]] = {
    "afmoe": {**MOE, "num_dense_layers": 1, "layer_types": SLIDING["layer_types"]},
    "apertus": {},
    "arcee": {},
    "bitnet": {},
    "bloom": {},
    "cohere": {},
    "deepseek_v2": {**DEEPSEEK, **MLA},
    "ernie4_5": {},
    "exaone4": {**SLIDING},
    "falcon_h1": {
        "mamba_n_heads": 8,
        "mamba_d_head": 8,
        "mamba_d_ssm": 64,
        "mamba_d_state": 8,
        "lm_head_multiplier": 0.5,
    },
    "gemma4_text": {"vocab_size_per_layer_input": V, **SLIDING, "final_logit_softcapping": 3.0},
    "glm": {},
    "gpt_bigcode": {},
    "granitemoe": {"num_local_experts": 4, "logits_scaling": 2.0, "embedding_multiplier": 3.0},
    "helium": {},
    "hunyuan_v1_dense": {},
    "jais2": {},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "llama4_text": {"num_local_experts": 4},
    "minicpm3": {**MLA, "num_key_value_heads": 4, "dim_model_base": 16, "head_dim": None},
    "minimax_m2": {},
    "ministral": {"sliding_window": 4},
    "mpt": {},
    "nanochat": {"final_logit_softcapping": 3.0},
    "nemotron": {},
    "olmo": {},
    "olmoe": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": H},
    "persimmon": {},
    "phimoe": {},
    "qwen3_5_text": LINEAR,
    "recurrent_gemma": {},
    "seed_oss": {},
    "vaultgemma": {**SLIDING, "final_logit_softcapping": 3.0},
    "xglm": {},
}
# Multimodal models: their text stack is captured, their towers are left alone.
VISION: dict[str, dict[str, Any]] = {
    "llava": {
        "text_config": {**COMMON, "model_type": "llama"},
        "vision_config": {**TINY_VISION, "model_type": "clip_vision_model"},
    },
    "mistral3": {
        "text_config": {**COMMON, "model_type": "mistral"},
        "vision_config": {**TINY_VISION, "model_type": "pixtral"},
    },
    "qwen2_5_vl": {"text_config": {**COMMON, "rope_parameters": MROPE}, "vision_config": QWEN_VISION},
    "qwen3_vl": {
        "text_config": {**COMMON, "rope_parameters": MROPE},
        "vision_config": {**QWEN_VISION, "deepstack_visual_indexes": [0]},
    },
}
FAMILIES = {**LISTED, **MORE, **VISION}
# What layer 0 takes is more than a scaled embedding here: position embeddings, a norm, a bf16 factor.
MORE_THAN_EMBEDDING = ("gpt2", "gpt_bigcode", "opt", "bloom", "xglm", "nanochat", "recurrent_gemma")
LENGTHS = (9, 5, 1)
passed: list[str] = []


class Count:
    """A pytest plugin of this file: says at the end how many families have parity."""

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        listed = sum(family in LISTED for family in passed)
        terminalreporter.write_line(
            f"families with parity: {len(passed)} ({listed} of the {len(LISTED)} that are promised)"
        )


@pytest.fixture(scope="module", autouse=True)
def count(request: pytest.FixtureRequest) -> None:
    request.config.pluginmanager.register(Count())


def make_model(family: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> nn.Module:
    values = {**FAMILIES[family], **overrides}
    if "text_config" not in values:
        values = {name: value for name, value in {**COMMON, **values}.items() if value is not None}
    try:
        config = AutoConfig.for_model(family, **values)
    except ValueError as error:  # the only ValueError of a type that this version does not know
        if "Unrecognized model identifier" not in str(error):
            raise
        pytest.skip(f"this transformers has no {family}")
    torch.manual_seed(3)
    auto = auto_class(Path(family), config)
    return auto.from_config(config).to(dtype).eval()


def make_batch() -> tuple[Tensor, Tensor]:
    """Right-padded ids and attention mask `[B, S]`; padding is a real token id."""
    ids = torch.randint(3, V, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    return ids, mask


def wrap(model: nn.Module) -> HFDSparkTargetModel:
    """The wrapper with every layer id; that SGLang can't serve them all is not what is tested here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LayerIdWarning)
        return HFDSparkTargetModel(model, range(-1, LAYERS))


@torch.no_grad()
def own_logits(model: nn.Module, last_hidden: Tensor) -> Tensor:
    """Logits as the teacher makes them: from what a cache stores and a manifest records."""
    head = model.get_output_embeddings()
    assert head.bias is None
    return head_logits(last_hidden, head.weight, final_logit_softcapping(model), logit_scale(model))


@pytest.mark.parametrize("family", FAMILIES)
def test_parity(family):
    model, (ids, mask) = make_model(family), make_batch()
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
    target = wrap(model)
    assert target._num_layers == LAYERS
    assert len(expected.hidden_states) == LAYERS + 1
    states = target.states(ids, mask)
    for layer_id in target.target_layer_ids:
        assert torch.equal(states[layer_id], expected.hidden_states[layer_id + 1]), f"layer {layer_id}"
    ordered = [states[layer_id] for layer_id in target.target_layer_ids]
    assert all((a - b).abs().max() > 1e-3 for a, b in pairwise(ordered)), "a layer off by one would not show"
    assert torch.equal(states["last_hidden"], states[LAYERS - 1])

    torch.testing.assert_close(
        own_logits(model, states["last_hidden"]), expected.logits, rtol=1e-5, atol=1e-5
    )

    for row, length in enumerate(LENGTHS):
        alone = target.states(ids[row : row + 1, :length], torch.ones(1, length).long())
        for key, state in alone.items():  # fp32: matrix products of other shapes sum in another order
            size = state.abs().max().item()
            torch.testing.assert_close(
                states[key][row, :length], state[0], rtol=1e-4, atol=2e-5 * max(1, size)
            )

    # Capture gives no mask: right padding must not reach what comes before it.
    unmasked = target.states(ids)
    for key, state in states.items():
        size = state[mask.bool()].abs().max().item()
        torch.testing.assert_close(
            unmasked[key][mask.bool()], state[mask.bool()], rtol=1e-4, atol=2e-5 * max(1, size)
        )

    if family not in MORE_THAN_EMBEDDING:
        rows = nn.functional.embedding(ids, model.get_input_embeddings().weight)
        assert torch.equal(embedding_scale(model) * rows, states[-1])
    passed.append(family)


def test_every_promised_family_is_tested():
    names = """
        llama mistral mixtral qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next gemma gemma2 gemma3_text gemma3
        phi3 gpt_oss deepseek_v3 glm4 glm4_moe olmo2 olmo3 smollm3 granite cohere2 starcoder2 stablelm
        gpt_neox gpt2 falcon
    """
    assert set(names.split()) == set(LISTED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "gemma3", "granite", "cohere2"])
def test_teacher_from_stored_states_is_the_targets_own_softmax(family, dtype):
    model, (ids, mask) = make_model(family, dtype), make_batch()
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    stored = wrap(model).states(ids, mask)["last_hidden"].to(torch.bfloat16)
    own, teacher = logits.float().softmax(-1), own_logits(model, stored).softmax(-1)
    variation = ((own - teacher).abs().sum(-1) / 2)[mask.bool()]
    # bf16 has 8 bits: a state rounded to it, and logits of a target that computes in it, are off by 2^-9.
    assert variation.mean() < 0.01
    assert variation.max() < 0.03
    if final_logit_softcapping(model) or logit_scale(model) != 1:  # neither may be left out
        head = model.get_output_embeddings().weight
        plain = head_logits(stored, head).softmax(-1)
        assert ((own - plain).abs().sum(-1) / 2)[mask.bool()].mean() > 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["gemma", "gemma2", "gemma3_text", "gemma3", "granite"])
def test_embedding_scale_is_recorded_as_the_target_applies_it(family, dtype):
    model, (ids, mask) = make_model(family, dtype), make_batch()
    rows = nn.functional.embedding(ids, model.get_input_embeddings().weight)
    assert embedding_scale(model) > 1
    assert torch.equal(embedding_scale(model) * rows, wrap(model).states(ids, mask)[-1])


def test_scales_that_the_forward_ignores_are_not_recorded():
    assert logit_scale(make_model("mpt", logit_scale=0.5)) == 1
    text = {**COMMON, "model_type": "cohere", "logit_scale": 0.25}
    assert logit_scale(make_model("llava", text_config=text)) == 1
    assert embedding_scale(make_model("llama", embedding_multiplier=3.0)) == 1


@pytest.mark.parametrize(
    ("family", "scale"), [("granite", 0.5), ("cohere2", 0.25), ("falcon_h1", 0.5), ("llama", 1.0)]
)
def test_logit_scale(family, scale):
    assert logit_scale(make_model(family)) == scale


def test_a_soft_cap_that_the_forward_ignores_is_not_recorded():
    text = {**FAMILIES["gemma3"]["text_config"], "final_logit_softcapping": 3.0}
    assert final_logit_softcapping(make_model("gemma3", text_config=text)) is None
    assert final_logit_softcapping(make_model("gemma3_text")) == 3.0


@pytest.mark.parametrize(
    "falcon", [{"new_decoder_architecture": True, "num_kv_heads": 2}, {"alibi": True}], ids=str
)
def test_both_kinds_of_falcon(falcon):
    model, (ids, mask) = make_model("falcon", **falcon), make_batch()
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
    states = wrap(model).states(ids, mask)
    assert all(torch.equal(states[i], expected.hidden_states[i + 1]) for i in range(-1, LAYERS))


@pytest.mark.parametrize(
    ("family", "overrides", "limit"),
    [("gpt2", {}, 64), ("opt", {"ffn_dim": 48, "word_embed_proj_dim": H}, 64), ("llama", {}, None)],
)
def test_learned_positions(family, overrides, limit):
    assert learned_positions(make_model(family, **overrides)) == limit
