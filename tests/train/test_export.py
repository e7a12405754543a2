"""`dspark export`: what engines read, written down by hand; what they can't serve; whole or not at all."""

from __future__ import annotations

import json
import math
import os
import shlex
import stat
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from tests.conftest import assert_refused, capture_arguments, run_cli, run_ok
from tests.tiny import make_target
from tests.train.exports import change_identity, change_json, changed
from tests.train.runs import train_arguments, weights_of
from train.draft.dspark.model import Qwen3DSparkModel

EMBEDDINGS = {"embed_tokens.weight", "lm_head.weight"}


def trained(folder: Path, cache: Path, **settings) -> Path:
    run_ok(*train_arguments(cache, folder, train__max_steps=3, **settings))
    return folder


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    """A run of the vanilla head. Read-only by agreement."""
    return trained(tmp_path_factory.mktemp("runs") / "vanilla", cache_dir)


@pytest.fixture(scope="module")
def rnn_dir(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    return trained(tmp_path_factory.mktemp("runs") / "rnn", cache_dir, draft__markov_head="rnn")


@pytest.fixture(scope="module")
def bare_dir(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    """A run of a draft without Markov and confidence head."""
    heads = {"draft__markov_head": "none", "draft__confidence_head": "false"}
    return trained(tmp_path_factory.mktemp("runs") / "bare", cache_dir, **heads)


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
        assert_refused(refused, 2, "export --to sglang or hf", "or train with draft.markov_head = vanilla")
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
    assert_refused(vllm, 2, "vllm can't serve this draft: markov_rank is 0", "export --to hf, or train with")
    sglang = run_cli("export", bare_dir, tmp_path / "out", "--to", "sglang")
    assert_refused(
        sglang, 2, "markov_rank is 0", "enable_confidence_head is False", "draft.confidence_head = true"
    )
    run_ok("export", bare_dir, tmp_path / "out", "--to", "hf")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["markov_rank"] == 0
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
        ("LlamaForCausalLM", ["vllm", "sglang"]),
        ("Qwen3ForCausalLM", ["vllm", "sglang"]),
        ("Qwen2ForCausalLM", ["vllm"]),
        ("GraniteForCausalLM", ["vllm"]),
        ("Olmo2ForCausalLM", ["vllm"]),
        ("Lfm2ForCausalLM", ["sglang"]),
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
    for engine, version in (("vllm", "vLLM 0.33.0"), ("sglang", "SGLang 0.5.23")):
        result = run_cli("export", run, tmp_path / engine, "--to", engine)
        assert result.exit_code == 0, result.output
        said = f"{version} serves no draft for a {architecture} target; a newer version may"
        assert (f"warning: {said}\n" in result.stderr) == (engine not in serving)
        card = (tmp_path / engine / "README.md").read_text(encoding="utf-8")
        assert (said in card) == (engine not in serving)
        assert (f"{version.removesuffix('.0')} or later" in card) == (engine in serving)
        assert front_matter(card)["tags"][3:] == serving
    assert "warning" not in run_cli("export", run, tmp_path / "hf", "--to", "hf").output


def test_sglang_would_round_float32(tmp_path: Path, run_dir: Path) -> None:
    refused = run_cli("export", run_dir, tmp_path / "out", "--to", "sglang", "--dtype", "float32")
    assert_refused(refused, 2, "sglang can't serve this draft in float32", "export --dtype bfloat16")
    assert not (tmp_path / "out").exists()
    run_ok("export", run_dir, tmp_path / "out", "--to", "vllm", "--dtype", "float32")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "SGLang can't serve it: dtype is float32" in card
    assert "vllm serve" in card
    run_ok("export", run_dir, tmp_path / "half", "--to", "sglang", "--dtype", "float16")


def front_matter(card: str) -> dict:
    _, header, _ = card.split("---\n", 2)
    return yaml.safe_load(header)


def test_the_model_card(tmp_path: Path, run_dir: Path, cache_dir: Path) -> None:
    run_ok("export", run_dir, tmp_path / "out", "--to", "vllm")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    page = json.loads((run_dir / "latest" / "training.json").read_text())
    assert front_matter(card) == {
        "base_model": "tiny-llama",
        "library_name": "dspark-pipeline",
        "tags": ["dspark", "speculative-decoding", "draft-model", "vllm", "sglang"],
    }
    assert page["cache"]["target"]["weights"] in card
    assert "target layers 0, 2, 4" in card
    assert "`chats.jsonl`" in card
    assert "bf16 context, bf16 last hidden" in card
    assert "train.lr = 0.003\n" in card
    assert "draft.init_from = none\n" in card
    assert f"torch {torch.__version__}" in card
    evaluation = page["progress"]["evaluation"]
    assert f"{evaluation['tau']:.3f} when sampling" in card
    for position, accepted in enumerate(evaluation["accept_by_position"]):
        assert f"| {position + 1} | {accepted:.3f} |\n" in card
    assert f"{page['progress']['parameters']:,} trained parameters" in card
    for text in ("None", "{{", "{%", "Undefined", str(run_dir), str(cache_dir)):
        assert text not in card
    commands = card.replace("\\\n", " ").splitlines()
    (vllm,) = [shlex.split(line) for line in commands if "vllm serve" in line]
    assert vllm[:4] == ["vllm", "serve", "tiny-llama", "--speculative-config"]
    assert json.loads(vllm[4]) == {
        "method": "dspark",
        "model": "DRAFT_DIR",
        "num_speculative_tokens": 3,
        "draft_sample_method": "probabilistic",
    }
    (sglang,) = [shlex.split(line) for line in commands if "sglang.launch_server" in line]
    assert sglang[:3] == ["python", "-m", "sglang.launch_server"]
    assert dict(zip(sglang[3::2], sglang[4::2], strict=True)) == {
        "--model-path": "tiny-llama",
        "--speculative-algorithm": "DSPARK",
        "--speculative-draft-model-path": "DRAFT_DIR",
    }


LIVE = {
    "runs": [
        {"temperature": 0.0, "tokens_per_round": 2.3456, "speedup": 1.75, "accept_given_prefix": [0.5, None]},
        {"temperature": 1.0, "tokens_per_round": 2.1, "speedup": None, "accept_given_prefix": []},
    ],
    "prompts": 12,
    "device": "a|GPU",
    "dtype": "bfloat16",
    "max_new_tokens": 1024,
    "threshold": 0.25,
}


def test_the_card_has_what_was_measured(tmp_path: Path, run_dir: Path, cache_dir: Path) -> None:
    run = changed(run_dir, tmp_path / "run")
    figures = json.loads(run_ok("evaluate", "--cache", cache_dir, "--run", run, "--json"))
    (run / "latest" / "speculation.json").write_text(json.dumps(LIVE))
    temperatures = {"temperatures": [1.5, 0.8, 2], "dataset": "held-out", "num_samples": 7}
    temperatures["ece_before"] = [0.5, 0.25, 0.125]
    others = {"ece_after": [0.1, None], "report": {"before": 1.0}}  # SGLang takes lists of numbers only
    (run / "latest" / "calibration.json").write_text(json.dumps({**temperatures, **others}))
    run_ok("export", run, tmp_path / "out", "--to", "sglang")
    assert json.loads((tmp_path / "out" / "calibration.json").read_text()) == temperatures
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"{figures['greedy_tau']:.3f} when greedy" in card
    assert f"{figures['blocks']:,} blocks of {figures['samples']:,}" in card
    first = figures["accept_by_position"][0], figures["accept_given_prefix"][0]
    assert f"| 1 | {first[0]:.3f} | {first[1]:.3f} |\n" in card
    assert "40 samples, 3,006 tokens" in card
    assert "12 prompts on a|GPU in bfloat16, at most 1,024 new tokens each, verifying tokens that" in card
    assert "with a probability of at least 0.25.\nThe speed-up is over plain decoding" in card
    assert "by transformers" in card
    assert "| 0.000 | 2.346 | 1.750 | 0.500 - |\n" in card
    assert "| 1.000 | 2.100 | - | - |\n" in card
    commands = card.replace("\\\n", " ").splitlines()
    (profile,) = [shlex.split(line) for line in commands if line.startswith("    python -m sglang.benchmark")]
    assert profile[2:4] == ["sglang.benchmark.dspark_sps_profiler", "all"]
    assert profile[profile.index("--out") + 1] == "SPS.json"
    (scheduled,) = [shlex.split(line) for line in commands if line.startswith("    SGLANG_RAGGED")]
    assert scheduled[0] == "SGLANG_RAGGED_VERIFY_MODE=compact"
    assert dict(zip(scheduled[4::2], scheduled[5::2], strict=True)) == {
        "--model-path": "tiny-llama",
        "--speculative-algorithm": "DSPARK",
        "--speculative-draft-model-path": "DRAFT_DIR",
        "--speculative-dspark-confidence-sts-path": "DRAFT_DIR/calibration.json",
        "--speculative-dspark-sps-table-path": "SPS.json",
    }


def test_whole_blocks_have_no_threshold(tmp_path: Path, run_dir: Path) -> None:
    run = changed(run_dir, tmp_path / "run")
    (run / "latest" / "speculation.json").write_text(json.dumps({**LIVE, "threshold": 0.0}))
    run_ok("export", run, tmp_path / "out", "--to", "hf")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "1,024 new tokens each.\nThe speed-up" in card


def test_the_card_sizes_the_data_that_it_was_trained_on(
    tmp_path: Path, run_dir: Path, cache_dir: Path, data_file: Path
) -> None:
    """Figures of another cache of the same target name theirs."""
    run, questions = changed(run_dir, tmp_path / "run"), tmp_path / "questions.jsonl"
    questions.write_text("".join(data_file.read_text().splitlines(keepends=True)[:20]))
    target = make_target(tmp_path / "tiny-llama")
    run_ok(*capture_arguments(target, questions, tmp_path / "cache"))
    run_ok("evaluate", "--cache", tmp_path / "cache", "--run", run)
    run_ok("export", run, tmp_path / "out", "--to", "hf")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    cache = json.loads((run / "latest" / "evaluation.json").read_text())["cache"]
    assert "of another cache (`questions.jsonl`, data of SHA-256 `" + cache["data_sha256"] in card
    assert "held-out ones included" not in card
    run_ok("evaluate", "--cache", cache_dir, "--run", run)
    run_ok("export", run, tmp_path / "own", "--to", "hf")
    card = (tmp_path / "own" / "README.md").read_text(encoding="utf-8")
    assert "another cache" not in card
    assert "40 samples, 3,006 tokens, held-out ones included" in card


def test_a_checkpoint_between_two_evaluations(tmp_path: Path, cache_dir: Path) -> None:
    """It has the figures of an older step's weights; and of a finished run, it is no unfinished one's."""
    run, steps = tmp_path / "run", {"train__max_steps": 4, "train__checkpoint_every": 1}
    run_ok(*train_arguments(cache_dir, run, **steps, train__eval_every=2, train__keep_checkpoints=9))
    for number, measured in ((2, True), (3, False), (4, True)):
        out = tmp_path / str(number)
        run_ok("export", run, out, "--to", "hf", "--checkpoint", f"step-{number:06d}")
        card = (out / "README.md").read_text(encoding="utf-8")
        assert ("Not measured." in card) != measured
        assert f"up to step {number} of 4, over" in card
        assert "not finished" not in card


def test_a_card_of_a_draft_that_nobody_measured(tmp_path: Path, cache_dir: Path) -> None:
    run = trained(tmp_path / "run", cache_dir, train__held_out=0.0)
    run_ok("export", run, tmp_path / "out", "--to", "hf")
    assert "Not measured." in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "name", ['a "b": c\n---\n# d `e`', "- [x, {y", "\x7f\x85\u2028z", "日本語 😀", "it's"]
)
def test_odd_names_do_not_break_the_card(tmp_path: Path, run_dir: Path, name: str) -> None:
    run = changed(run_dir, tmp_path / "run")
    page = json.loads((run / "latest" / "training.json").read_text())
    page["cache"]["target"]["name"] = name
    page["cache"]["data"]["sources"] = ["{{ 7 * 7 }}.jsonl"]
    (run / "latest" / "training.json").write_text(json.dumps(page))
    run_ok("export", run, tmp_path / "out", "--to", "hf")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    expected = " ".join("".join(c if c.isprintable() else " " for c in name).split())
    assert front_matter(card)["base_model"] == expected
    assert "`{{ 7 * 7 }}.jsonl`" in card
    (line,) = [line for line in card.replace("\\\n", " ").splitlines() if "vllm serve" in line]
    assert shlex.split(line)[2] == expected


def test_paths_of_the_machine_stay_at_home(tmp_path: Path, run_dir: Path, cache_dir: Path) -> None:
    run = trained(tmp_path / "run", cache_dir, draft__init_from=run_dir)
    run_ok("export", run, tmp_path / "out", "--to", "hf")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "draft.init_from = vanilla\n" in card
    assert str(run_dir.parent) not in card


def test_any_checkpoint(tmp_path: Path, cache_dir: Path) -> None:
    run = tmp_path / "run"
    run_ok(*train_arguments(cache_dir, run, train__max_steps=4, train__checkpoint_every=2))
    for checkpoint in ("step-000002", "latest"):
        run_ok(
            "export",
            run,
            tmp_path / checkpoint,
            "--to",
            "hf",
            "--dtype",
            "float32",
            "--checkpoint",
            checkpoint,
        )
        folder = run / ("latest" if checkpoint == "latest" else f"checkpoints/{checkpoint}")
        got, wanted = (load_file(f / "model.safetensors") for f in (tmp_path / checkpoint, folder))
        assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    missing = run_cli("export", run, tmp_path / "no", "--to", "hf", "--checkpoint", "step-000009")
    assert_refused(missing, 1, "no finished checkpoint", "step-000002")


@pytest.mark.parametrize("failing", ["save_file", "rename"])
def test_nothing_is_left_of_an_export_that_fails(
    tmp_path: Path, run_dir: Path, monkeypatch, failing: str
) -> None:
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    where = "pathlib.Path.rename" if failing == "rename" else f"train.export.writer.{failing}"
    with monkeypatch.context() as patch:
        patch.setattr(where, full)
        result = run_cli("export", run_dir, tmp_path / "out", "--to", "hf")
    assert_refused(result, 1, "No space left on device")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".out.partial").mkdir()  # of a process that was killed
    (tmp_path / ".out.partial" / "old").write_text("")
    run_ok("export", run_dir, tmp_path / "out", "--to", "hf")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "old").exists()


def test_a_directory_with_something_in_it_stays_as_it_is(tmp_path: Path, run_dir: Path) -> None:
    out = tmp_path / "deep" / "out"
    run_ok("export", run_dir, out, "--to", "hf")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert_refused(run_cli("export", run_dir, out, "--to", "hf"), 2, "out is not empty", "choose another")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (tmp_path / "file").write_text("")
    assert_refused(run_cli("export", run_dir, tmp_path / "file", "--to", "hf"), 2, "is a file")
    long = run_cli("export", run_dir, tmp_path / ("x" * 300), "--to", "hf")
    assert_refused(long, 1, "can't be written")
    (tmp_path / "empty").mkdir()
    run_ok("export", run_dir, tmp_path / "empty", "--to", "hf")
    assert (tmp_path / "empty" / "config.json").is_file()


def test_an_empty_directory_is_filled(tmp_path: Path, run_dir: Path, monkeypatch) -> None:
    """It stays the one it was, for whoever is in it, and config.json comes last."""
    out = tmp_path / "out"
    out.mkdir(mode=0o750)
    before, order = out.stat(), []
    rename = Path.rename

    def recorded(path: Path, target: Path) -> Path:
        order.append(Path(target).name)
        return rename(path, target)

    def full(path: Path, target: Path) -> Path:
        if path.name == "config.json" and path.parent.name == ".partial":
            raise OSError(28, "No space left on device")
        return rename(path, target)

    monkeypatch.chdir(out)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", full)
        assert_refused(run_cli("export", run_dir, ".", "--to", "hf"), 1, "No space left on device")
    assert list(out.iterdir()) == []
    (out / ".partial").mkdir()  # of a process that was killed
    monkeypatch.setattr(Path, "rename", recorded)
    run_ok("export", run_dir, ".", "--to", "hf")
    assert {path.name for path in Path.cwd().iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert (out.stat().st_ino, out.stat().st_mode) == (before.st_ino, before.st_mode)
    assert order[-1] == "config.json"
    assert list(tmp_path.iterdir()) == [out]


def test_odd_directories(tmp_path: Path, run_dir: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    assert_refused(run_cli("export", run_dir, tmp_path / "loop", "--to", "hf"), 1, "can't be written")
    odd = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    shown = b"\xff".decode(sys.getfilesystemencoding(), "replace")  # no character in UTF-8
    assert f"{shown}: the draft of" in run_ok("export", run_dir, odd, "--to", "hf")
    assert (odd / "config.json").is_file()


def test_others_may_read_it_as_far_as_the_umask_lets_them(tmp_path: Path, run_dir: Path) -> None:
    for umask in (0o022, 0o077):
        before = os.umask(umask)
        try:
            run_ok("export", run_dir, tmp_path / oct(umask), "--to", "hf")
        finally:
            os.umask(before)
        for path in (tmp_path / oct(umask)).iterdir():
            assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask, path


def test_what_goes_together_and_what_does_not(
    tmp_path: Path, run_dir: Path, cache_dir: Path, data_file: Path
) -> None:
    out = tmp_path / "out"
    assert_refused(run_cli("export", run_dir, out), 2, "--to")
    assert_refused(run_cli("export", run_dir, out, "--to", "tgi"), 2, "tgi")
    assert_refused(run_cli("export", run_dir, out, "--to", "hf", "--with-embeddings"), 2, "needs --cache")
    assert_refused(
        run_cli("export", run_dir, out, "--to", "hf", "--cache", cache_dir), 2, "--with-embeddings"
    )
    assert_refused(
        run_cli("export", tmp_path / "no", out, "--to", "hf"), 1, "no finished checkpoint", "dspark train"
    )
    run_ok(*capture_arguments(make_target(tmp_path / "other", seed=9), data_file, tmp_path / "cache"))
    embeddings = ["--with-embeddings", "--cache", tmp_path / "cache"]
    other = run_cli("export", run_dir, out, "--to", "hf", *embeddings)
    assert_refused(other, 1, "was trained for target tiny-llama", "with other weights")
    assert not out.exists()


def test_damaged_checkpoints_are_one_line(tmp_path: Path, run_dir: Path) -> None:
    def refused(run: Path, code: int, *parts: str) -> None:
        assert_refused(
            run_cli("export", run, tmp_path / "out", "--to", "hf", "--dtype", "float16"), code, *parts
        )
        assert not (tmp_path / "out").exists()

    refused(changed(run_dir, tmp_path / "a", markov_rank=4), 1, "other tensors than its config says")
    refused(changed(run_dir, tmp_path / "b", mask_token_id=None), 1, "is damaged", "mask_token_id")
    run = changed(run_dir, tmp_path / "c")
    (run / "latest" / "config.json").write_text("{")
    refused(run, 1, "is damaged")
    for name, value, code, part in (
        ("d", 1e5, 2, "float16 can't hold"),
        ("e", float("nan"), 1, "not finite"),
    ):
        run = changed(run_dir, tmp_path / name)
        weights = weights_of(run)
        weights["fc.weight"][0, 0] = value
        save_file(weights, run / "latest" / "model.safetensors")
        refused(run, code, "fc.weight", part)
    for number, temperatures in enumerate(
        ([1.0, 1.0], [1.0, 0.0, 1.0], "hot", [1.0, True, 1.0], [1, math.nan, 1], None)
    ):
        run = changed(run_dir, tmp_path / f"t{number}")
        (run / "latest" / "calibration.json").write_text(json.dumps({"temperatures": temperatures}))
        refused(run, 1, "calibration.json", "3 positive temperatures", "dspark calibrate")
    for number, text in enumerate(("{", '{"accept_by_position": 3, "tau": 1.0}', '{"tau": 1.0}')):
        run = changed(run_dir, tmp_path / f"f{number}")
        (run / "latest" / "evaluation.json").write_text(text)
        refused(run, 1, "can't be read", "measure again")
    change_json(run / "latest" / "training.json", progress=None)
    refused(run, 1, "is damaged")


def test_help_says_what_engines_are_there() -> None:
    text = run_ok("export", "--help")
    assert "hf|vllm|sglang" in text
    assert "--with-embeddings" in text
