"""A run of a DFlash draft under D-PACE: killed and continued, exported as engines read it, and imported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import assert_refused, run_cli, run_ok
from tests.processes import start_ranks
from tests.train.exports import change_json, changed, contents
from tests.train.runs import figures_of, train_arguments, weights_of
from tests.train.test_ranks import assert_near

KIND = {
    "draft__kind": "dflash",
    "draft__markov_rank": None,
    "draft__block_size": 4,
    "loss__slot_weights": "dpace",
    "loss__l1_alpha": 0.5,
    "train__max_steps": 4,
    "train__micro_batches_per_step": 2,
    "train__log_every": 1,
}
AS_THAT_RUN = ("--set", "train.held_out=0.2", "--set", "train.precision=fp32")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    """Read-only by agreement."""
    path = tmp_path_factory.mktemp("dflash") / "run"
    run_ok(*train_arguments(cache_dir, path, **KIND))
    return path


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory, run_dir: Path, cache_dir: Path) -> Path:
    """That draft as z-lab releases drafts: the block's size inside dflash_config alone; in bf16, with the
    target's embedding and head. Read-only by agreement."""
    folder = tmp_path_factory.mktemp("released") / "draft"
    run_ok("export", run_dir, folder, "--to", "hf", "--with-embeddings", "--cache", cache_dir)
    change_json(folder / "config.json", block_size=None, num_target_layers=None, target_hidden_size=None)
    return folder


def copied(released: Path, folder: Path, nested: dict | None = None, **fields) -> Path:
    """A released draft whose config says something else, `nested` in its dflash_config; None takes away."""
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(released / "model.safetensors")
    shutil.copy(released / "config.json", folder)
    if nested is not None:
        own = json.loads((folder / "config.json").read_text())["dflash_config"] | nested
        fields["dflash_config"] = {name: value for name, value in own.items() if value is not None}
    change_json(folder / "config.json", **fields)
    return folder


def test_it_learns_and_a_continued_run_is_the_same(run_dir: Path, cache_dir: Path, tmp_path: Path) -> None:
    """Killed after its second step and continued: the same file of weights, and the same log."""
    run, settings = tmp_path / "run", KIND | {"train__checkpoint_every": 2}
    run_ok(*train_arguments(cache_dir, run, **settings))
    shutil.rmtree(run / "checkpoints" / "step-000004")
    again = run_cli(*train_arguments(cache_dir, run, **settings))
    assert "continuing from step 2 of 4" in again.stderr
    name = "latest/model.safetensors"
    assert (run / name).read_bytes() == (run_dir / name).read_bytes()
    assert figures_of(run)[-1] == figures_of(run_dir)[-1]
    losses = [line["ce_loss"] for line in figures_of(run_dir) if "ce_loss" in line]
    assert losses[-1] < losses[0]


def test_dpace_is_not_the_decay(run_dir: Path, cache_dir: Path, tmp_path: Path) -> None:
    """And a smoothing of 1 trusts every slot: it is neither of both."""
    found = [weights_of(run_dir)["fc.weight"]]
    for number, own in enumerate(({"loss__slot_weights": "decay"}, {"loss__dpace_smoothing": 1.0})):
        run_ok(*train_arguments(cache_dir, tmp_path / str(number), **KIND | own))
        found.append(weights_of(tmp_path / str(number))["fc.weight"])
    assert not any(torch.equal(found[i], found[i - 1]) for i in range(3))


def test_two_ranks_do_what_one_does(run_dir: Path, cache_dir: Path, tmp_path: Path) -> None:
    """D-PACE's weights are each rank's own; their sum is all ranks'. Three micro-batches, shared unevenly."""
    shared = KIND | {"train__micro_batches_per_step": 3}
    run_ok(*train_arguments(cache_dir, tmp_path / "one", **shared))
    two = train_arguments(cache_dir, tmp_path / "two", **shared, train__parallelism="ddp")
    for process in start_ranks(tmp_path / "out", 2, *two):
        assert process.wait() == 0, process.err
    assert_near(tmp_path / "two", tmp_path / "one")
    assert not torch.equal(*(weights_of(run)["fc.weight"] for run in (run_dir, tmp_path / "one")))


@pytest.mark.parametrize("to", ["hf", "vllm", "sglang"])
def test_the_config_is_what_engines_read(tmp_path: Path, run_dir: Path, to: str) -> None:
    run_ok("export", run_dir, tmp_path / "out", "--to", to)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "vocab_size": 325,
        "hidden_size": 32,
        "target_hidden_size": 32,
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
        "block_size": 4,
        "num_target_layers": 6,
        "dflash_config": {
            "mask_token_id": 320,
            "target_layer_ids": [0, 2, 4],
            "block_size": 4,
            "causal": False,
        },
    }
    layer = [f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")]
    layer += [f"mlp.{part}" for part in ("gate_proj", "up_proj", "down_proj")]
    layer += ["input_layernorm", "post_attention_layernorm"]
    names = {f"layers.0.{part}.weight" for part in layer} | {"fc.weight", "hidden_norm.weight", "norm.weight"}
    got, wanted = load_file(tmp_path / "out" / "model.safetensors"), weights_of(run_dir)
    assert set(got) == names
    assert got["fc.weight"].shape == (32, 3 * 32)
    assert all(torch.equal(weight, wanted[name].bfloat16()) for name, weight in got.items())
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert '"method": "dflash"' in card
    assert '"num_speculative_tokens": 3' in card
    assert "--speculative-algorithm DFLASH" in card


@pytest.mark.parametrize(
    ("fields", "refusing", "parts"),
    [
        ({"target_layer_ids": [-1, 0, 2]}, ["sglang"], ["target_layer_ids is [-1, 0, 2]", "within [0, 4]"]),
        (
            {"target_layer_ids": [0, 2, 5]},
            ["vllm", "sglang"],
            ["target_layer_ids is [0, 2, 5]", "last layer"],
        ),
        ({"mask_token_id": 325}, ["vllm", "sglang"], ["mask_token_id is 325", "row of the embedding"]),
        ({"final_logit_softcapping": 30.0}, ["vllm", "sglang"], ["final_logit_softcapping is 30.0"]),
        ({"logit_scale": 0.125}, ["vllm", "sglang"], ["logit_scale is 0.125"]),
        ({"embedding_scale": 5.5}, ["vllm", "sglang"], ["embedding_scale is 5.5"]),
    ],
    ids=str,
)
def test_what_an_engine_cant_serve_is_refused_by_name(
    tmp_path: Path, run_dir: Path, fields: dict, refusing: list[str], parts: list[str]
) -> None:
    run = changed(run_dir, tmp_path / "run", **fields)
    for engine in ("vllm", "sglang"):
        result = run_cli("export", run, tmp_path / engine, "--to", engine)
        if engine in refusing:
            assert_refused(result, 2, f"{engine} can't serve this draft", "export --to ", *parts)
        else:
            assert result.exit_code == 0, result.output
        assert (tmp_path / engine).exists() == (result.exit_code == 0)


def test_a_smaller_vocabulary_is_only_vllms(tmp_path: Path, cache_dir: Path) -> None:
    run = tmp_path / "run"
    run_ok(*train_arguments(cache_dir, run, **KIND | {"train__max_steps": 1}, draft__draft_vocab_size=40))
    head = ("--with-embeddings", "--cache", cache_dir)
    refused = run_cli("export", run, tmp_path / "sglang", "--to", "sglang", *head)
    assert_refused(refused, 2, "sglang can't serve this draft", "draft_vocab_size is 40")
    run_ok("export", run, tmp_path / "vllm", "--to", "vllm", *head)
    assert json.loads((tmp_path / "vllm" / "config.json").read_text())["draft_vocab_size"] == 40


def test_a_released_draft_becomes_a_run_and_comes_out_again(
    tmp_path: Path, cache_dir: Path, run_dir: Path, released: Path
) -> None:
    result = run_cli("import", released, "--cache", cache_dir, "--run", tmp_path / "run", *AS_THAT_RUN)
    assert result.exit_code == 0, result.output
    assert "warning" not in result.stderr
    got = weights_of(tmp_path / "run")
    assert got.keys() == weights_of(run_dir).keys()
    for name, weight in weights_of(run_dir).items():
        assert torch.equal(got[name], weight.bfloat16().float()), name
    ours, theirs = (
        json.loads((run / "latest" / "config.json").read_text()) for run in (tmp_path / "run", run_dir)
    )
    assert ours | {"num_anchors": 64} == theirs
    for source, out in ((run_dir, "first"), (tmp_path / "run", "again")):
        run_ok("export", source, tmp_path / out, "--to", "vllm")
    assert contents(tmp_path / "again") == contents(tmp_path / "first")


def test_fields_that_say_nothing_are_taken(tmp_path: Path, cache_dir: Path, released: Path) -> None:
    nested = {"input_embedding_scale": 1.0, "output_multiplier": 1.0, "sample_from_anchor": False}
    nested |= {"use_aux_hidden_state": True, "use_swa": False, "causal": None}
    ids = [1, 3, 5]  # in vLLM's counting
    fields = {"block_size": 4, "eagle_aux_hidden_state_layer_ids": ids, "max_window_layers": 1}
    fields |= {"tie_word_embeddings": True, "auto_map": {"AutoModel": "dflash.DFlashDraftModel"}}
    folder = copied(released, tmp_path / "draft", nested, **fields)
    run_ok("import", folder, "--cache", cache_dir, "--run", tmp_path / "run", *AS_THAT_RUN)


WINDOW = {"layer_types": ["sliding_attention"], "use_sliding_window": True, "sliding_window": 9}
NULL = {"target_layer_ids": [0, 2, 4], "mask_token_id": None, "block_size": 4}


@pytest.mark.parametrize(
    ("nested", "fields", "code", "parts"),
    [
        ({}, {"dflash_config": None}, 1, ["has no dflash_config", "is not a DFlash draft"]),
        ({}, {"dflash_config": [1]}, 1, ["has no dflash_config", "is not a DFlash draft"]),
        ({"target_layer_ids": None}, {}, 1, ["has no dflash_config.target_layer_ids"]),
        ({}, {"dflash_config": NULL}, 1, ["has no dflash_config.mask_token_id"]),
        ({"mask_token_id": None}, {}, 1, ["has no dflash_config.mask_token_id"]),
        ({"target_layer_ids": [0, 2, 3]}, {}, 1, ["holds layers [0, 2, 4]", "asks for 3"]),
        ({"target_layer_ids": [4, 2, 0]}, {}, 2, ["target_layer_ids must be strictly increasing"]),
        ({"target_layer_ids": "all"}, {}, 2, ["config.json.draft.target_layer_ids"]),
        ({"target_layer_ids": [0, 2]}, {}, 1, ["fc.weight", "is of shape [32, 96], expected [32, 64]"]),
        ({"mask_token_id": 325}, {}, 2, ["mask_token_id must be in [0, 325)"]),
        ({"mask_token_id": "320"}, {}, 2, ["config.json.draft.mask_token_id"]),
        ({"block_size": 1}, {}, 2, ["block_size must be at least 2"]),
        ({"block_size": "many"}, {}, 2, ["block_size"]),
        ({}, {"block_size": 8}, 1, ["block_size = 8", "dflash_config.block_size = 4"]),
        ({"sample_from_anchor": True}, {}, 1, ["sample_from_anchor = True"]),
        ({"causal": True}, {}, 1, ["causal"]),
        ({"projector_type": "domino"}, {}, 1, ["projector_type = 'domino'"]),
        ({"conv_kernel_size": 2}, {}, 1, ["conv_kernel_size = 2"]),
        ({"input_embedding_scale": 2.0}, {}, 1, ["input_embedding_scale = 2.0"]),
        ({"output_multiplier": 0.5}, {}, 1, ["output_multiplier = 0.5"]),
        ({"use_swa": True, "swa_window_size": 9}, {}, 1, ["use_swa"]),
        ({"final_logit_softcapping": 30.0}, {}, 1, ["final_logit_softcapping = 30.0", "expected None"]),
        (
            {},
            {"architectures": ["DFlash2DraftModel"]},
            1,
            ["no dflash_config.conv_kernel_size", "DFlash2 draft"],
        ),
        ({}, {"model_type": "kimi"}, 1, ["model_type = 'kimi'"]),
        ({}, {"vocab_size": 999}, 1, ["another target than tiny-llama", "vocab_size: 999 there"]),
        ({}, {"num_target_layers": 7}, 1, ["num_target_layers: 7 there, 6 in the cache"]),
        ({}, {"target_hidden_size": 64}, 1, ["target_hidden_size", "64"]),
        ({}, {"eagle_aux_hidden_state_layer_ids": [0, 2, 4]}, 1, ["has eagle_aux_hidden_state_layer_ids"]),
        ({}, {"num_hidden_layers": 2, "layer_types": None}, 1, ["lacks layers.1", "another kind of draft"]),
        ({}, {"num_hidden_layers": "one"}, 1, ["can't be read"]),
        ({"causal": None}, WINDOW, 1, ["layer_types", "is_causal = false"]),
        ({}, {**WINDOW, "sliding_window": 2}, 2, ["sliding_window must be at least block_size = 4"]),
        ({}, {"rms_norm_eps": 1e-5}, 1, ["rms_norm_eps: 1e-05 there, 1e-06 here"]),
        ({}, {"quantization_config": {"quant_method": "fp8"}}, 1, ["unquantized weights"]),
        ({}, {"draft_vocab_size": 100}, 1, ["d2t"]),
    ],
    ids=str,
)
def test_a_draft_that_no_run_can_have_is_one_line(
    tmp_path: Path, cache_dir: Path, released: Path, nested: dict, fields: dict, code: int, parts: list[str]
) -> None:
    folder = copied(released, tmp_path / "draft", nested or None, **fields)
    result = run_cli("import", folder, "--cache", cache_dir, "--run", tmp_path / "run", *AS_THAT_RUN)
    assert_refused(result, code, *parts)
    assert [path.name for path in tmp_path.iterdir()] == ["draft"]


@pytest.mark.parametrize("name", ["mask_hidden", "layers.0.attention_conv.base_kernel", "markov_head.w1"])
def test_weights_of_another_kind_of_draft(tmp_path: Path, cache_dir: Path, released: Path, name: str) -> None:
    folder = copied(released, tmp_path / "draft")
    (folder / "model.safetensors").unlink()
    weights = load_file(released / "model.safetensors")
    save_file({**weights, name: torch.zeros(3)}, folder / "model.safetensors")
    result = run_cli("import", folder, "--cache", cache_dir, "--run", tmp_path / "run", *AS_THAT_RUN)
    assert_refused(result, 1, f"has {name}", "another kind of draft")
