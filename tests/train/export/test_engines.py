"""`dspark export`: what engines read, written down by hand, and what they can't serve."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from tests.conftest import assert_refused, run_cli, run_ok
from tests.train.exports import change_identity, changed, front_matter, trained
from tests.train.runs import weights_of
from train.draft import DRAFTS
from train.draft.dspark.model import Qwen3DSparkModel
from train.export.engines import unknown_target

EMBEDDINGS = {"embed_tokens.weight", "lm_head.weight"}


@pytest.mark.parametrize("to", ["hf", "vllm", "sglang"])
def test_the_config_is_what_engines_read(tmp_path: Path, run_dir: Path, to: str) -> None:
    run_ok("export", run_dir, tmp_path / "out", "--to", to)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {
        "architectures": ["Qwen3DSparkModel"],
        "model_type": "qwen3",
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "vocab_size": 325,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "rope_theta": 10000.0,
        "layer_types": ["full_attention"],
        "tie_word_embeddings": False,
        "block_size": 3,
        "num_anchors": 64,
        "mask_token_id": 320,
        "target_layer_ids": [0, 2, 4],
        "num_target_layers": 6,
        "markov_rank": 8,
        "markov_head_type": "vanilla",
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
        "sample_from_anchor": True,
        "dspark_bonus_anchor": False,
    }
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json",
        "model.safetensors",
        "README.md",
    }


def test_a_window_is_declared_as_engines_read_it(tmp_path: Path, cache_dir: Path) -> None:
    """Both engines hide a block's later slots in sliding layers, unless is_causal is false."""
    types = ["sliding_attention", "full_attention"]
    run = trained(
        tmp_path / "run",
        cache_dir,
        draft__num_layers=2,
        draft__sliding_window=9,
        draft__layer_types=json.dumps(types),
    )
    for to in ("hf", "vllm", "sglang"):
        run_ok("export", run, tmp_path / to, "--to", to)
        config = json.loads((tmp_path / to / "config.json").read_text())
        names = ("use_sliding_window", "sliding_window", "layer_types", "is_causal")
        assert [config[name] for name in names] == [True, 9, types, False]
        read = AutoConfig.from_pretrained(tmp_path / to)
        assert (read.sliding_window, read.layer_types, read.is_causal) == (9, types, False)
        card = (tmp_path / to / "README.md").read_text(encoding="utf-8")
        assert "sliding attention, of the layers 0: a slot sees 9 positions, its own included" in card
    assert Qwen3DSparkModel.from_pretrained(tmp_path / "hf").windows == (9, None)
    plain = {name: value for name, value in config.items() if name not in names}
    full = trained(tmp_path / "full", cache_dir, draft__num_layers=2)
    run_ok("export", full, tmp_path / "out", "--to", "hf")
    other = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {name: value for name, value in other.items() if name not in names} == plain
    assert "is_causal" not in other
    assert "sliding_window" not in other


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_weights_are_the_drafts_without_a_prefix(tmp_path: Path, run_dir: Path, dtype: str) -> None:
    run_ok("export", run_dir, tmp_path / "out", "--to", "vllm", "--dtype", dtype)
    got, wanted = load_file(tmp_path / "out" / "model.safetensors"), weights_of(run_dir)
    layer = [f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")]
    layer += [f"mlp.{part}" for part in ("gate_proj", "up_proj", "down_proj")]
    layer += ["input_layernorm", "post_attention_layernorm"]
    names = [f"layers.0.{part}" for part in layer] + ["fc", "hidden_norm", "norm", "confidence_head.proj"]
    names += ["markov_head.markov_w1", "markov_head.markov_w2"]
    assert set(got) == {f"{name}.weight" for name in names} | {"confidence_head.proj.bias"}
    for name, weight in got.items():
        assert weight.dtype == getattr(torch, dtype)
        assert torch.equal(weight, wanted[name].to(weight.dtype)), name
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype


def test_embedding_and_head_come_when_asked_for(tmp_path: Path, run_dir: Path, cache_dir: Path) -> None:
    """Two tensors, as tie_word_embeddings is false, even where the target ties them."""
    arguments = ["--to", "vllm", "--dtype", "float32", "--with-embeddings", "--cache", cache_dir]
    run_ok("export", run_dir, tmp_path / "out", *arguments)
    got = load_file(tmp_path / "out" / "model.safetensors")
    frozen = load_file(cache_dir / "target" / "frozen.safetensors")
    assert set(got) == set(weights_of(run_dir)) | EMBEDDINGS
    assert torch.equal(got["embed_tokens.weight"], frozen["embed_tokens.weight"].float())
    head = frozen.get("lm_head.weight", frozen["embed_tokens.weight"])
    assert torch.equal(got["lm_head.weight"], head.float())


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 5e5}


@pytest.mark.parametrize("rope", [None, YARN], ids=["default", "yarn"])
def test_transformers_reads_the_same_draft(tmp_path: Path, run_dir: Path, rope: dict | None) -> None:
    """With the old names of the rotary settings beside the new ones, and with either alone."""
    run = changed(run_dir, tmp_path / "run", **({"rope_parameters": rope} if rope else {}))
    out = tmp_path / "out"
    run_ok("export", run, out, "--to", "hf", "--dtype", "float32")
    rope = rope or {"rope_type": "default", "rope_theta": 10000.0}
    assert ("rope_scaling" in json.loads((out / "config.json").read_text())) == (rope == YARN)
    for absent in ([], ["rope_parameters"], ["rope_theta", "rope_scaling"]):
        values = json.loads((out / "config.json").read_text())
        (tmp_path / "config.json").write_text(
            json.dumps({k: v for k, v in values.items() if k not in absent})
        )
        config = AutoConfig.from_pretrained(tmp_path)
        assert type(config).__name__ == "Qwen3Config"
        assert config.rope_parameters == rope
        assert config.target_layer_ids == [0, 2, 4]
        assert config.dtype == torch.float32
    model = Qwen3DSparkModel.from_pretrained(out)
    for name, weight in weights_of(run_dir).items():
        assert torch.equal(model.get_parameter(name), weight), name


def test_a_head_that_only_one_engine_has(tmp_path: Path, rnn_dir: Path, cache_dir: Path) -> None:
    gated = trained(tmp_path / "run", cache_dir, draft__markov_head="gated")
    for run, head, own in ((rnn_dir, "rnn", "joint_proj"), (gated, "gated", "gate_proj")):
        refused = run_cli("export", run, tmp_path / f"v-{head}", "--to", "vllm")
        assert_refused(refused, 2, "vllm can't serve", f"markov_head_type is {head}", "only the vanilla head")
        assert_refused(refused, 2, "or sglang or hf, ", "or train with draft.markov_head = vanilla")
        assert not (tmp_path / f"v-{head}").exists()
        run_ok("export", run, tmp_path / head, "--to", "sglang")
        names = set(load_file(tmp_path / head / "model.safetensors"))
        assert {f"markov_head.{own}.weight", f"markov_head.{own}.bias"} <= names
        assert json.loads((tmp_path / head / "config.json").read_text())["markov_head_type"] == head
        card = (tmp_path / head / "README.md").read_text(encoding="utf-8")
        assert f"vLLM can't serve it: markov_head_type is {head}" in card
        assert "vllm serve" not in card
        assert "--speculative-algorithm DSPARK" in card


def test_a_draft_without_heads_is_only_hugging_faces(tmp_path: Path, bare_dir: Path) -> None:
    vllm = run_cli("export", bare_dir, tmp_path / "out", "--to", "vllm")
    assert_refused(vllm, 2, "vllm can't serve this draft: markov_rank is 0", " or hf, or train with")
    sglang = run_cli("export", bare_dir, tmp_path / "out", "--to", "sglang")
    assert_refused(
        sglang, 2, "markov_rank is 0", "enable_confidence_head is False", "draft.confidence_head = true"
    )
    run_ok("export", bare_dir, tmp_path / "out", "--to", "hf")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["markov_rank"] == 0
    assert (
        config["confidence_head_with_markov"] is False
    )  # readers differ in what they take a missing one for
    assert not any("head" in name for name in load_file(tmp_path / "out" / "model.safetensors"))


@pytest.mark.parametrize(
    ("fields", "refusing", "parts"),
    [
        ({"target_layer_ids": [-1, 0, 2]}, ["sglang"], ["target_layer_ids is [-1, 0, 2]", "within [0, 4]"]),
        (
            {"target_layer_ids": [0, 2, 5]},
            ["vllm", "sglang"],
            ["target_layer_ids is [0, 2, 5]", "the last layer"],
        ),
        ({"mask_token_id": 325}, ["vllm", "sglang"], ["mask_token_id is 325", "row of the embedding"]),
        ({"mask_token_id": -1}, ["vllm", "sglang"], ["mask_token_id is -1"]),
        ({"markov_head_type": "other"}, [], []),  # no such draft: damaged
        ({"final_logit_softcapping": 30.0}, ["vllm", "sglang"], ["final_logit_softcapping is 30.0"]),
        ({"logit_scale": 0.125}, ["vllm", "sglang"], ["logit_scale is 0.125"]),
        ({"embedding_scale": 5.5}, ["vllm", "sglang"], ["embedding_scale is 5.5", "unscaled"]),
        (
            {"logit_scale": 2.0, "mask_token_id": 400},
            ["vllm", "sglang"],
            ["logit_scale", "; ", "mask_token_id"],
        ),
    ],
    ids=str,
)
def test_what_an_engine_cant_serve_is_refused_by_name(
    tmp_path: Path, run_dir: Path, fields: dict, refusing: list[str], parts: list[str]
) -> None:
    run = changed(run_dir, tmp_path / "run", **fields)
    for engine in ("vllm", "sglang"):
        result = run_cli("export", run, tmp_path / engine, "--to", engine)
        if "markov_head_type" in fields:
            assert_refused(result, 1, "is damaged")
        elif engine in refusing:
            assert_refused(result, 2, f"{engine} can't serve this draft", "export --to ", *parts)
        else:
            assert result.exit_code == 0, result.output
        assert (tmp_path / engine).exists() == (result.exit_code == 0)
    if "markov_head_type" not in fields:  # whoever loads it with our own class gets all of it
        run_ok("export", run, tmp_path / "hf", "--to", "hf")
        config = json.loads((tmp_path / "hf" / "config.json").read_text())
        assert {name: config[name] for name in fields} == fields


def test_scaled_embeddings_are_only_hugging_faces(tmp_path: Path, run_dir: Path, cache_dir: Path) -> None:
    """Our own class scales; engines do not, whatever embedding comes along."""
    run = changed(run_dir, tmp_path / "run", embedding_scale=5.5)
    extra = ["--with-embeddings", "--cache", cache_dir, "--dtype", "float32"]
    for engine in ("vllm", "sglang"):
        refused = run_cli("export", run, tmp_path / engine, "--to", engine, *extra)
        assert_refused(refused, 2, "embedding_scale is 5.5", "unscaled: export --to hf")
    run_ok("export", run, tmp_path / "hf", "--to", "hf", *extra)
    frozen = load_file(cache_dir / "target" / "frozen.safetensors")
    plain = load_file(tmp_path / "hf" / "model.safetensors")["embed_tokens.weight"]
    assert torch.equal(plain, frozen["embed_tokens.weight"].float())
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["embedding_scale"] == 5.5


@pytest.mark.parametrize(
    ("architecture", "serving"),
    [
        ("LlamaForCausalLM", ["vllm", "sglang", "llama.cpp"]),
        ("Qwen3ForCausalLM", ["vllm", "sglang", "llama.cpp"]),
        ("Qwen2ForCausalLM", ["vllm"]),
        ("GraniteForCausalLM", ["vllm"]),
        ("Olmo2ForCausalLM", ["vllm"]),
        ("Lfm2ForCausalLM", ["sglang", "llama.cpp"]),
        ("GemmaForCausalLM", []),
        ("Gemma2ForCausalLM", []),
        ("Gemma3ForCausalLM", []),
        ("CohereForCausalLM", []),
        ("StableLmForCausalLM", []),
    ],
)
def test_a_target_that_an_engine_does_not_know(
    tmp_path: Path, run_dir: Path, architecture: str, serving: list[str]
) -> None:
    """A newer version may: a warning, and no unqualified command in the card."""
    run = changed(run_dir, tmp_path / "run")
    change_identity(run, architecture=architecture)
    versions = {"vllm": "vLLM 0.33.0", "sglang": "SGLang 0.5.23"}
    for engine, version in {**versions, "llama.cpp": "llama.cpp of llama-cpp-python 0.3.36"}.items():
        result = run_cli("export", run, tmp_path / engine, "--to", engine)
        assert result.exit_code == 0, result.output
        said = f"{version} serves no draft for a {architecture} target; a newer version may"
        assert (f"warning: {said}\n" in result.stderr) == (engine not in serving)
        card = (tmp_path / engine / "README.md").read_text(encoding="utf-8")
        assert (said in card) == (engine not in serving)
        assert (f"As read in the source of {version}" in card) == (engine in serving)
        assert front_matter(card)["tags"][3:] == serving
    assert "warning" not in run_cli("export", run, tmp_path / "hf", "--to", "hf").output


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_sglang_is_told_not_to_round_float32(tmp_path: Path, run_dir: Path, dtype: str) -> None:
    """By default it rounds float32 weights; its own option says otherwise, in each of its commands."""
    run = changed(run_dir, tmp_path / "run")
    (run / "latest" / "calibration.json").write_text(json.dumps({"temperatures": [1.5, 0.8, 2.0]}))
    run_ok("export", run, tmp_path / "out", "--to", "sglang", "--dtype", dtype)
    assert {w.dtype for w in load_file(tmp_path / "out" / "model.safetensors").values()} == {
        getattr(torch, dtype)
    }
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    lines = card.replace("\\\n", " ").splitlines()
    commands = [shlex.split(line) for line in lines if "sglang.launch_server" in line]
    assert len(commands) == 2
    for command in commands:
        assert ("--dtype" in command) == (dtype == "float32")
        if dtype == "float32":
            assert command[command.index("--dtype") + 1] == "float32"
    assert ("Without `--dtype float32` it would round" in card) == (dtype == "float32")


@pytest.mark.parametrize(
    ("architecture", "serving"),
    [
        ("Qwen3ForCausalLM", {"dspark", "dflash", "dflash2", "eagle3"}),
        ("LlamaForCausalLM", {"dspark", "dflash", "dflash2", "eagle3"}),
        ("Qwen2ForCausalLM", {"eagle3"}),
        ("Qwen2MoeForCausalLM", {"eagle3"}),
        ("Glm4MoeForCausalLM", {"eagle3"}),
        ("Gemma3ForConditionalGeneration", {"eagle3"}),
        ("Lfm2ForCausalLM", {"dspark", "dflash", "dflash2"}),
        ("NemotronHForCausalLM", {"dspark", "dflash", "dflash2"}),
        ("KimiLinearForCausalLM", {"dspark"}),
        ("DeepseekV4ForCausalLM", {"dspark"}),
        ("Gemma2ForCausalLM", set()),
        ("Gemma4AssistantForCausalLM", set()),
    ],
)
def test_sglang_serves_other_targets_by_kind_of_draft(architecture: str, serving: set[str]) -> None:
    """Each kind asks the target's class for another method."""
    found = {name: unknown_target(kind.targets, architecture, "sglang") for name, kind in DRAFTS.items()}
    assert {name for name, said in found.items() if said is None} == serving
    assert all(said is None or f"no draft for a {architecture} target" in said for said in found.values())


def test_what_was_seen_of_an_engine_is_in_the_card(tmp_path: Path, run_dir: Path) -> None:
    run_ok("export", run_dir, tmp_path / "out", "--to", "vllm")
    card = " ".join((tmp_path / "out" / "README.md").read_text(encoding="utf-8").split())
    llama_cpp = "llama.cpp of llama-cpp-python 0.3.36 on a CPU"
    for version in ("vLLM 0.32.0 on a CPU", "SGLang 0.5.23, patched by hand to run on a CPU,", llama_cpp):
        assert f"{version} has served a draft of this kind in fp32. Every token" in card
    assert "or later" not in card


def test_help_says_what_engines_are_there() -> None:
    text = run_ok("export", "--help")
    assert "hf|vllm|sglang|llama.cpp|tensorrt-llm|speculators" in text
    assert "--with-embeddings" in text
