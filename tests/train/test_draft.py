"""The draft as a Hugging Face model: names, saving, casting, embedding and head."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import PretrainedConfig

from pipeline.cache import CacheReader
from pipeline.errors import CacheError
from tests.train.drafts import as_batch, random_samples, small_config, small_model
from train.draft.dspark.config import draft_config
from train.draft.dspark.model import Qwen3DSparkModel
from train.draft.dspark.settings import DSparkConfig
from train.draft.shape import read_target_config

LAYER = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "self_attn.q_norm",
    "self_attn.k_norm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
    "input_layernorm",
    "post_attention_layernorm",
]
EVERYWHERE = ["embed_tokens", "lm_head", "fc", "hidden_norm", "norm", "markov_head.markov_w1"]
EVERYWHERE += ["markov_head.markov_w2", "confidence_head.proj"]


@pytest.mark.parametrize(
    ("head", "extra"),
    [("vanilla", []), ("gated", ["markov_head.gate_proj"]), ("rnn", ["markov_head.joint_proj"])],
)
def test_parameter_names_are_what_engines_load(head: str, extra: list[str]) -> None:
    names = {f"layers.{i}.{part}.weight" for i in range(2) for part in LAYER}
    names |= {f"{part}.weight" for part in EVERYWHERE + extra}
    names |= {f"{part}.bias" for part in ["confidence_head.proj", *extra]}
    assert set(Qwen3DSparkModel(small_config(markov_head_type=head)).state_dict()) == names


def test_parameter_shapes() -> None:
    weights = Qwen3DSparkModel(small_config(markov_head_type="rnn")).state_dict()
    assert weights["fc.weight"].shape == (16, 32)
    assert weights["markov_head.markov_w1.weight"].shape == (31, 6)
    assert weights["markov_head.markov_w2.weight"].shape == (31, 6)
    assert weights["markov_head.joint_proj.weight"].shape == (18, 28)
    assert weights["confidence_head.proj.weight"].shape == (1, 22)


def test_save_and_load_round_trip(tmp_path) -> None:
    model = small_model(markov_head_type="gated")
    model.save_pretrained(tmp_path)
    again = Qwen3DSparkModel.from_pretrained(tmp_path, dtype=torch.float64)
    assert again.config.architectures == ["Qwen3DSparkModel"]
    for (name, a), (other, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other
        assert torch.equal(a, b), name
    batch = as_batch(random_samples([[1] * 7]), [[1, 3]])
    assert torch.equal(model.eval()(**batch).draft_logits, again.eval()(**batch).draft_logits)


def test_rope_stays_fp32_after_a_cast(tmp_path) -> None:
    """1/10000^(2i/8) for i = 0..3; in bf16 the second would be 0.10009765625."""
    expected = torch.tensor([1.0, 0.1, 0.01, 0.001])
    model = Qwen3DSparkModel(small_config())
    model.save_pretrained(tmp_path)
    for cast in (model.to(torch.bfloat16), Qwen3DSparkModel.from_pretrained(tmp_path, dtype=torch.bfloat16)):
        assert cast.fc.weight.dtype == torch.bfloat16
        assert cast.rotary_emb.inv_freq.dtype == torch.float32
        torch.testing.assert_close(cast.rotary_emb.inv_freq, expected, rtol=1e-7, atol=0)


def test_embedding_and_head_are_copied_and_frozen() -> None:
    model = Qwen3DSparkModel(small_config())
    embed, head = torch.nn.Embedding(31, 16), torch.nn.Linear(16, 31, bias=False)
    model.initialize_embeddings_and_head(embed_tokens=embed, lm_head=head)
    assert torch.equal(model.embed_tokens.weight, embed.weight)
    assert torch.equal(model.lm_head.weight, head.weight)
    assert not model.embed_tokens.weight.requires_grad
    assert not model.lm_head.weight.requires_grad
    model.initialize_embeddings_and_head(embed_tokens=embed, lm_head=head, freeze=False)
    assert model.embed_tokens.weight.requires_grad
    assert model.lm_head.weight.requires_grad


def test_the_confidence_term_reaches_the_backbone() -> None:
    model = small_model()
    model(**as_batch(random_samples([[1] * 6]), [[1, 2]])).confidence_pred.sum().backward()
    assert model.layers[0].mlp.up_proj.weight.grad.any()
    assert model.markov_head.markov_w1.weight.grad.any()


def test_it_draws_its_own_anchors() -> None:
    model = small_model(num_anchors=5)
    batch = as_batch(random_samples([[0, 1, 1, 1, 0, 1, 1, 1, 1, 1], [0, 0, 1, 1]]), [[1], [2]])
    del batch["anchor_positions"], batch["block_keep_mask"]
    torch.manual_seed(0)
    outputs = model(**batch)
    assert outputs.draft_logits.shape == outputs.aligned_target_logits.shape == (2, 5, 3, 31)
    assert outputs.block_keep_mask.sum(dim=1).tolist() == [5, 1]
    assert outputs.confidence_pred.shape == outputs.target_ids.shape == (2, 5, 3)


def test_context_of_another_width_is_refused() -> None:
    batch = as_batch(random_samples([[1] * 4]), [[0]])
    batch["target_hidden_states"] = batch["target_hidden_states"][..., :16]
    with pytest.raises(ValueError, match=r"width 32 \(2 layers\), got 16"):
        small_model()(**batch)


ROPES = {
    "plain": {"rope_theta": 5e5, "rope_type": "default"},
    "partial": {"rope_theta": 5e5, "rope_type": "default", "partial_rotary_factor": 0.5},
    "partial and scaled": {
        "rope_theta": 5e5,
        "rope_type": "linear",
        "factor": 4.0,
        "partial_rotary_factor": 0.5,
    },
    "partial longrope": {
        "rope_theta": 5e5,
        "rope_type": "longrope",
        "partial_rotary_factor": 0.5,
        "short_factor": [1.0, 2.0],
        "long_factor": [3.0, 4.0],
        "original_max_position_embeddings": 64,
    },
    "sets by layer": {
        "full_attention": {"rope_theta": 5e5, "rope_type": "default"},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    },
}


@pytest.mark.parametrize("name", ROPES)
def test_whatever_rope_the_target_has_the_drafts_heads_rotate_whole(cache_dir, name) -> None:
    manifest = CacheReader(cache_dir).manifest
    target = PretrainedConfig(num_attention_heads=4, head_dim=8, intermediate_size=48)
    target.rope_parameters = ROPES[name]
    config = draft_config(DSparkConfig(num_layers=1, block_size=3, markov_rank=8), target, manifest, (0, 2))
    assert config.rope_parameters["rope_theta"] == 5e5
    model = Qwen3DSparkModel(config)
    ids = torch.randint(9, (1, 12))
    out = model(ids, torch.randn(1, 12, 64), torch.ones(1, 12))
    assert out.draft_logits.isfinite().all()


def test_a_target_with_code_of_its_own_is_read_without_running_it(cache_dir, tmp_path) -> None:
    folder = shutil.copytree(cache_dir / "target", tmp_path / "target")
    plain = read_target_config(folder)
    values = json.loads((folder / "config.json").read_text())
    values |= {"model_type": "own_llama", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "own.py").write_text("raise SystemExit('this ran')")
    manifest = CacheReader(cache_dir).manifest
    made = [
        draft_config(DSparkConfig(markov_rank=8), target, manifest, (0, 2)).to_dict()
        for target in (plain, read_target_config(folder))
    ]
    assert made[0] == made[1]
    (folder / "config.json").write_text(json.dumps({"model_type": "nobody's"}))
    with pytest.raises(CacheError, match=r"config\.json can't be read"):
        read_target_config(folder)
