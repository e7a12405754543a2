"""EAGLE-3's settings, config, collate function, counted operations, rules of engines and import."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from pipeline.errors import ConfigError, RunError
from tests.train.eagle3.drafts import chosen, pack, small_config, small_model
from train.data.loader import Pack, PackedSample
from train.data.sampling import drawn_anchors, spread_anchors
from train.draft.eagle3.collate import collate_chains
from train.draft.eagle3.config import FIELDS, draft_config, exported, weight_fields
from train.draft.eagle3.flops import training_flops
from train.draft.eagle3.kind import EAGLE3
from train.draft.eagle3.module import Eagle3TrainerModule
from train.draft.eagle3.released import check_released, released_settings, released_weights
from train.draft.eagle3.serving import RULES
from train.draft.eagle3.settings import Eagle3Config, Eagle3Loss
from train.draft.settings import run_config
from train.losses.slots import Objective

PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.addmm_)
CONFIG = {
    "model_type": "llama",
    "vocab_size": 151_936,
    "hidden_size": 2560,
    "intermediate_size": 9728,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "rope_parameters": {"rope_theta": 1_000_000, "rope_type": "default"},
    "rope_theta": 1_000_000,
    "tie_word_embeddings": False,
    "draft_vocab_size": 151_936,
    "target_hidden_size": 2560,
    "num_aux_hidden_states": 3,
    "fc_norm": False,
    "norm_output": True,
    "norm_before_residual": False,
    "norm_before_fc": False,
    "ttt_steps": 7,
    "eagle_aux_hidden_state_layer_ids": [2, 18, 33],
    "eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": [1, 17, 32]},
}


def qwen3_4b(**own) -> LlamaConfig:
    """The config of a draft for Qwen3-4B."""
    facts = {"hidden_size": 2560, "vocab_size": 151_936, "num_layers": 36, "embedding_scale": 1.0}
    facts |= {"logit_scale": 1.0, "final_logit_softcapping": None}
    manifest = SimpleNamespace(identity=SimpleNamespace(target=SimpleNamespace(**facts)))
    target = LlamaConfig(
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=9728,
        max_position_embeddings=40_960,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_theta": 1_000_000, "rope_type": "default"},
    )
    return draft_config(Eagle3Config(**own), target, manifest, (1, 17, 32))


def test_engines_read_these_fields() -> None:
    """The whole exported config: layers counted from 0 for SGLang, one higher for vLLM."""
    assert exported(qwen3_4b(norm_output=True)) == CONFIG
    assert json.loads(json.dumps(CONFIG)) == CONFIG
    assert EAGLE3.served(qwen3_4b(ttt_steps=5)) == {
        "vllm": {"method": "eagle3", "num_speculative_tokens": 5, "draft_sample_method": "probabilistic"},
        "sglang": "EAGLE3",
        "tensorrt-llm": {
            "decoding_type": "Eagle3",
            "max_draft_len": 5,
            "eagle3_layers_to_capture": [1, 17, 32],
        },
    }


def test_engines_load_these_weights() -> None:
    """By name and shape, of a draft with every option."""
    model = EAGLE3.build(small_config(draft_vocab_size=20, fc_norm=True))
    found = {name: list(weight.shape) for name, weight in model.state_dict().items()}
    assert found == {
        "d2t": [20],
        "embed_tokens.weight": [31, 16],
        "fc.weight": [16, 48],
        "fc_norm.0.weight": [16],
        "fc_norm.1.weight": [16],
        "fc_norm.2.weight": [16],
        "lm_head.weight": [20, 16],
        "midlayer.hidden_norm.weight": [16],
        "midlayer.input_layernorm.weight": [16],
        "midlayer.mlp.down_proj.weight": [16, 24],
        "midlayer.mlp.gate_proj.weight": [24, 16],
        "midlayer.mlp.up_proj.weight": [24, 16],
        "midlayer.post_attention_layernorm.weight": [16],
        "midlayer.self_attn.k_proj.weight": [16, 32],
        "midlayer.self_attn.o_proj.weight": [16, 32],
        "midlayer.self_attn.q_proj.weight": [32, 32],
        "midlayer.self_attn.v_proj.weight": [16, 32],
        "norm.weight": [16],
        "t2d": [31],
    }
    assert model.d2t.dtype == torch.int64
    assert model.t2d.dtype == torch.bool
    assert {"d2t", "t2d"}.isdisjoint(EAGLE3.build(small_config()).state_dict())


def test_the_vocabulary_is_kept_as_offsets() -> None:
    """Engines add d2t to the draft's id; a token's own head row comes along, frozen or not."""
    kept = torch.tensor([1, 4, 5, 30])
    head, embedding = torch.randn(31, 16), torch.randn(31, 16)
    for trained in (True, False):
        model = EAGLE3.build(small_config(draft_vocab_size=4, train_head=trained))
        model.keep(kept)
        model.initialize_embeddings_and_head(embedding, head)
        assert model.d2t.tolist() == [1, 3, 3, 27]
        assert model.t2d.nonzero().squeeze(1).tolist() == model.kept.tolist() == kept.tolist()
        assert torch.equal(model.lm_head.weight, head[kept])
        assert torch.equal(model.embed_tokens.weight, embedding)
        assert model.lm_head.weight.requires_grad == trained
        assert not model.embed_tokens.weight.requires_grad
        assert model.draft_ids(torch.tensor([30, 0, 4, 2])).tolist() == [3, -1, 1, -1]


@pytest.mark.parametrize(
    ("table", "values", "message"),
    [
        (Eagle3Config, {"ttt_steps": 0}, "ttt_steps must be at least 1, got 0"),
        (Eagle3Config, {"head_dim": 7}, "head_dim must be even, got 7"),
        (Eagle3Loss, {"step_decay": 0.0}, r"step_decay must be in \(0, 1\], got 0.0"),
        (Eagle3Loss, {"step_decay": 1.5}, r"step_decay must be in \(0, 1\], got 1.5"),
        (Eagle3Loss, {"soft_ce_alpha": 0.0}, "soft_ce_alpha, ce_alpha and l1_alpha can't all be 0"),
        (Eagle3Loss, {"l1_alpha": -1.0}, "l1_alpha must not be negative, got -1.0"),
    ],
)
def test_wrong_settings_are_refused(table: type, values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        table(**values)
    assert "\n" not in str(error.value)


def test_a_cache_may_lack_what_no_term_needs() -> None:
    for own, wanted in (({}, True), ({"soft_ce_alpha": 0.0, "ce_alpha": 1.0}, False)):
        config = run_config({"draft": {"kind": "eagle3"}, "loss": own})
        assert EAGLE3.needs_last_hidden(config) == wanted
    config = run_config({"draft": {"kind": "eagle3"}, "loss": {"soft_ce_alpha": 0.0, "l1_alpha": 1.0}})
    assert EAGLE3.needs_last_hidden(config)


def documents(masks: list[list[int]]) -> list[PackedSample]:
    starts = np.cumsum([0, *map(len, masks)])
    return [
        PackedSample(bytes([i]), int(starts[i]), np.array(mask, dtype=np.uint8))
        for i, mask in enumerate(masks)
    ]


def test_every_candidate_with_a_row_before_it_is_an_anchor() -> None:
    """In training all; in evaluation those of the choice; and the host knows what is supervised of them."""
    masks = [[1, 1, 1, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1]]
    for choose, wanted in ((drawn_anchors(None, 0), [1, 4, 5, 9, 10, 11]), (spread_anchors(2), [5, 9, 11])):
        found = collate_chains(choose)(documents(masks))
        anchors = found["anchor_positions"][0]
        assert anchors[found["block_keep_mask"][0]].tolist() == wanted
        assert len(anchors) == 16
        assert anchors.tolist()[8:] == [wanted[-1]] * 8  # dummies add nothing to what is computed
        batch = pack(masks, padding=0)
        model = small_model()
        with torch.no_grad():
            blocks = model.draft_blocks(
                *(batch[n] for n in ("input_ids", "target_hidden_states", "loss_mask")),
                found["anchor_positions"],
                found["block_keep_mask"],
                batch["document_ids"],
                found["spans"],
            )
        slots = np.arange(model.slots) < found["supervised_tokens"][..., None]
        assert np.array_equal(blocks.eval_mask.numpy(), slots)
        module = Eagle3TrainerModule(model, Objective.of(Eagle3Loss()))
        known, asked = module(**batch, **found), module(**batch, **chosen(wanted))
        torch.testing.assert_close(known.loss, asked.loss)
    empty = collate_chains(drawn_anchors(None, 0))(documents([[0, 0, 0]]))
    assert not empty["block_keep_mask"].any()
    assert not empty["supervised_tokens"].any()


@pytest.mark.parametrize("trained", [True, False])
def test_counted_products_are_those_that_run(trained: bool) -> None:
    """All but attention's. The context's last row and the first step's own keys are in none."""
    model = small_model(list(range(0, 31, 2)), train_head=trained)
    batch, anchors = pack([[0, 1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]], padding=0), [1, 3, 4, 6, 9, 12]
    batch["document_ids"] = batch["document_ids"].long()
    collated = {name: each[:, :-1] for name, each in chosen(anchors).items()}
    with FlopCounterMode(display=False) as counter:
        Eagle3TrainerModule(model, Objective.of(Eagle3Loss())).train()(**batch, **collated).loss.backward()
    counts = counter.get_flop_counts()["Global"]
    ran = sum(counts.get(product, 0) for product in PRODUCTS)
    own = {name: batch[name] for name in ("input_ids", "loss_mask", "document_ids")}
    packed = Pack(**own, collated=collated, num_tokens=14)
    # Rows before an anchor, counted in its document; each step sees them and its own earlier keys.
    steps, seen = 4, 1 + 3 + 4 + 6 + 1 + 4
    pairs = steps * seen + len(anchors) * (0 + 1 + 2 + 3)
    attended = 12 * 4 * 8 * pairs
    grouped = 2 * 4 * 8 * steps * len(anchors) * 12 * 7  # of all chains as one group, over rows 0 to 11
    wanted = training_flops(model.config, packed) - attended
    slots = (4 + 4 + 3 + 1) + (4 + 1)
    in_place = 2 * slots * 16 * 16 if trained else 0  # the head's gradient, which the counter does not see
    assert ran - grouped == wanted - in_place


def test_engines_refuse_what_they_cannot_serve() -> None:
    """Each rule holds for a draft of the default settings, and names the field that breaks it."""
    broken = {
        "vllm": {
            "target_layer_ids": [1, 35],
            "embedding_scale": 2.0,
            "final_logit_softcapping": 30.0,
        },
        "sglang": {"target_layer_ids": [-1, 3], "embedding_scale": 2.0, "logit_scale": 0.5},
    }
    for engine, values in broken.items():
        assert all(rule.holds(qwen3_4b()) for rule in RULES[engine])
        for name, value in values.items():
            shape = qwen3_4b()
            setattr(shape, name, value)
            assert [rule.field for rule in RULES[engine] if not rule.holds(shape)] == [name]


def test_an_exported_config_comes_back() -> None:
    """As settings of a run: all that the weights depend on."""
    values = CONFIG | {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": 32_000}
    check_released(values, "config.json")
    draft, filled = released_settings(values, {}, "config.json")
    assert draft == {
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 9728,
        "fc_norm": False,
        "norm_output": True,
        "ttt_steps": 7,
        "target_layer_ids": (1, 17, 32),
        "draft_vocab_size": 32_000,
    }
    assert filled["target_layer_ids"] == [1, 17, 32]
    shape = qwen3_4b(norm_output=True)
    ours, theirs = weight_fields(shape.to_dict()), weight_fields(CONFIG)
    assert theirs.items() <= ours.items()
    assert theirs["target_layer_ids"] == [1, 17, 32]
    assert ours.keys() - theirs.keys() == {"num_target_layers"}
    assert {*FIELDS} <= shape.to_dict().keys()
    lone = {name: value for name, value in values.items() if name != "eagle_config"}
    assert released_settings(lone, {}, "config.json")[0]["target_layer_ids"] == (1, 17, 32)


NESTED = {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": [1, 17, 32]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["Eagle3Qwen3ForCausalLM"]}, "architectures = .'Eagle3Qwen3ForCausalLM'."),
        ({"norm_before_residual": True}, "norm_before_residual = True, expected False"),
        ({"num_hidden_layers": 2}, "num_hidden_layers = 2, expected 1"),
        ({"parallel_drafting": True}, "parallel_drafting = True"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "without use_aux_hidden_state"),
        ({"eagle_config": NESTED | {"norm_before_fc": True}}, "eagle_config.norm_before_fc = True"),
        ({"quantization_config": {}}, "expected unquantized weights"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 17, 32]}, "the first must be one higher"),
        ({"eagle_aux_hidden_state_layer_ids": 3}, "can't be read"),
        ({"eagle_config": None, "eagle_aux_hidden_state_layer_ids": None}, "does not say which layers"),
    ],
)
def test_other_drafts_are_refused_by_the_field(change: dict, message: str) -> None:
    values = CONFIG | {"architectures": ["LlamaForCausalLMEagle3"]} | change
    values = {name: value for name, value in values.items() if value is not None}
    with pytest.raises(RunError, match=message) as error:
        check_released(values, "config.json")
    assert "\n" not in str(error.value)


FIVE = {"vocab_size": 5}


def test_other_trainers_names_are_ours() -> None:
    """The layer's name, a prefix, and a table of tokens that says nothing."""
    one = torch.ones(2)
    weights = {"model.layers.0.mlp.up_proj.weight": one, "model.fc.weight": one, "lm_head.weight": one}
    found = released_weights(weights | {"d2t": torch.tensor([1, 2], dtype=torch.int32)}, FIVE)
    assert {*found} == {"midlayer.mlp.up_proj.weight", "fc.weight", "lm_head.weight", "d2t"}
    whole = released_weights({"d2t": torch.zeros(5), "t2d": torch.ones(5), "midlayer.x": one}, FIVE)
    assert {*whole} == {"midlayer.x"}
    assert "d2t" in released_weights({"d2t": torch.tensor([4, 2, 0, -2, -4])}, FIVE)  # in another order
