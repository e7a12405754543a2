"""A run of a DFlash2 draft: killed and continued, measured, exported as engines read it, and imported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.cache import CacheReader
from tests.conftest import assert_refused, run_cli, run_ok
from tests.processes import start_ranks
from tests.train.dflash.test_run import AS_THAT_RUN, copied
from tests.train.exports import KINDS, change_json, changed, contents
from tests.train.runs import figures_of, train_arguments, weights_of
from tests.train.test_ranks import assert_near
from train.draft import DRAFTS
from train.draft.blocks.ridge import ridge_initialise
from train.draft.settings import run_config
from train.trainer.setup import set_up

SETTINGS = {
    **KINDS["dflash2"],
    "draft__selector_top_k": 160,
    "loss__slot_weights": "dpace",
    "loss__l1_alpha": 0.5,
    "train__max_steps": 4,
    "train__micro_batches_per_step": 2,
    "train__log_every": 1,
}
SCALES = {"embedding_scale": 5.5, "logit_scale": 0.125, "final_logit_softcapping": 30.0}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, cache_dir: Path) -> Path:
    """Read-only by agreement."""
    path = tmp_path_factory.mktemp("dflash2") / "run"
    run_ok(*train_arguments(cache_dir, path, **SETTINGS))
    return path


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory, run_dir: Path) -> Path:
    """That draft as z-lab releases drafts: fields of dflash_config are only there. Read-only by agreement."""
    folder = tmp_path_factory.mktemp("released") / "draft"
    run_ok("export", run_dir, folder, "--to", "hf")
    change_json(folder / "config.json", block_size=None, num_target_layers=None, target_hidden_size=None)
    return folder


def test_it_learns_and_a_continued_run_is_the_same(run_dir: Path, cache_dir: Path, tmp_path: Path) -> None:
    """Killed after its second step and continued: the same file of weights, and the same log."""
    run, settings = tmp_path / "run", SETTINGS | {"train__checkpoint_every": 2}
    run_ok(*train_arguments(cache_dir, run, **settings))
    shutil.rmtree(run / "checkpoints" / "step-000004")
    again = run_cli(*train_arguments(cache_dir, run, **settings))
    assert "continuing from step 2 of 4" in again.stderr
    name = "latest/model.safetensors"
    assert (run / name).read_bytes() == (run_dir / name).read_bytes()
    assert figures_of(run)[-1] == figures_of(run_dir)[-1]
    lines = [line for line in figures_of(run_dir) if "ce_loss" in line]
    assert lines[-1]["ce_loss"] < lines[0]["ce_loss"]
    assert all(line["selector_loss"] > 0 for line in lines)


def test_sharded_ranks_do_what_one_does(run_dir: Path, cache_dir: Path, tmp_path: Path) -> None:
    """The selector's embeddings are looked up outside of the layers. Three micro-batches, shared unevenly."""
    shared = SETTINGS | {"train__micro_batches_per_step": 3}
    run_ok(*train_arguments(cache_dir, tmp_path / "one", **shared))
    two = train_arguments(cache_dir, tmp_path / "two", **shared, train__parallelism="fsdp")
    for process in start_ranks(tmp_path / "out", 2, *two):
        assert process.wait() == 0, process.err
    assert_near(tmp_path / "two", tmp_path / "one")


def test_first_weights_by_regression_are_those_of_a_block_draft_without_a_selector(cache_dir: Path) -> None:
    reader, made = CacheReader(cache_dir), []
    for kind, own in (("dflash", {}), ("dflash2", {"selector_rank": 8})):
        draft = {"kind": kind, "num_layers": 1, "block_size": 4, "init": "ridge", **own}
        config = run_config({"draft": draft, "train": {"held_out": 0.2, "anchors_per_batch": 64}})
        setup = set_up(cache_dir, config, torch.device("cpu"))
        model = DRAFTS[kind].build(setup.shape)
        model.load_state_dict(made[0] if made else {}, strict=False)
        made.append({name: weight.clone() for name, weight in model.state_dict().items()})
        if kind == "dflash":
            ridge_initialise(model, reader, setup.samples)
        else:
            DRAFTS[kind].initialise(model, setup.config.draft, reader, setup.samples)
        made.append(model.state_dict())
    before, dflash, _, dflash2 = made
    assert not torch.equal(before["fc.weight"], dflash["fc.weight"])
    assert all(torch.equal(dflash2[name], weight) for name, weight in dflash.items())


def test_what_is_measured_is_the_selectors_choice(run_dir: Path, cache_dir: Path) -> None:
    """The L1 distance stays that of all tokens: it is not twice what is rejected, as for other kinds."""
    result = json.loads(
        run_ok("evaluate", "--cache", cache_dir, "--run", run_dir, "--device", "cpu", "--json")
    )
    further = result["further_losses"]
    assert 0 < further["missed"] < 1
    assert further["selector"] > 0
    assert result["l1_loss"] / 2 + result["accept_rate"] != pytest.approx(1, abs=1e-3)
    loss = result["ce_loss"] + 0.5 * result["l1_loss"] + further["selector"]
    assert result["loss"] == pytest.approx(loss, rel=1e-6)


def test_the_config_is_what_engines_read(tmp_path: Path, run_dir: Path) -> None:
    wanted = weights_of(run_dir)
    for to in ("hf", "vllm", "sglang"):
        run_ok("export", run_dir, tmp_path / to, "--to", to)
        values = json.loads((tmp_path / to / "config.json").read_text())
        assert values["architectures"] == ["DFlash2DraftModel"]
        assert values["dflash_config"] == {
            "mask_token_id": 320,
            "target_layer_ids": [0, 2, 4],
            "block_size": 4,
            "causal": False,
            "conv_kernel_size": 2,
            "conv_group_size": 16,
            "selector_rank": 8,
            "selector_top_k": 160,
        }
        got = load_file(tmp_path / to / "model.safetensors")
        shapes = {
            name: list(weight.shape) for name, weight in got.items() if "conv" in name or "selector" in name
        }
        assert shapes == {
            "layers.0.attention_conv.base_kernel": [2, 2, 32],
            "layers.0.attention_conv.kernel_projection.weight": [2 * 2 * 2, 32],
            "layers.0.mlp_conv.base_kernel": [2, 2, 32],
            "layers.0.mlp_conv.kernel_projection.weight": [2 * 2 * 2, 32],
            "candidate_selector.predecessor_codebook": [325, 8],
            "candidate_selector.successor_codebook": [325, 8],
            "candidate_selector.hidden_projection.weight": [8, 32],
        }
        assert got.keys() == wanted.keys()
        assert all(torch.equal(weight, wanted[name].bfloat16()) for name, weight in got.items())
        card = (tmp_path / to / "README.md").read_text(encoding="utf-8")
        assert '"method": "dflash"' in card
        assert '"num_speculative_tokens": 3, "draft_sample_method": "probabilistic"' in card
        assert "--speculative-algorithm DFLASH" in card
        assert "convolutions over 2 rows of a block, in groups of 16 channels" in card
        assert "selector of rank 8, which chooses among 160 candidates" in card


def test_the_targets_scales_are_where_engines_look(tmp_path: Path, run_dir: Path) -> None:
    run = changed(run_dir, tmp_path / "run", **SCALES)
    run_ok("export", run, tmp_path / "vllm", "--to", "vllm")
    nested = json.loads((tmp_path / "vllm" / "config.json").read_text())["dflash_config"]
    names = ("input_embedding_scale", "output_multiplier", "final_logit_softcapping")
    assert [nested[name] for name in names] == [5.5, 0.125, 30.0]
    refused = run_cli("export", run, tmp_path / "sglang", "--to", "sglang")
    assert_refused(refused, 2, "sglang can't serve this draft: embedding_scale is 5.5")
    others = changed(run_dir, tmp_path / "others", **SCALES | {"embedding_scale": 1.0})
    run_ok("export", others, tmp_path / "out", "--to", "sglang")
    for to in ("llama.cpp", "tensorrt-llm"):
        refused = run_cli("export", run_dir, tmp_path / "no", "--to", to)
        assert_refused(
            refused, 2, f"{to} can't serve this draft", "neither the convolutions nor the selector"
        )


def test_a_released_draft_becomes_a_run_and_comes_out_again(
    tmp_path: Path, cache_dir: Path, run_dir: Path, released: Path
) -> None:
    result = run_cli("import", released, "--cache", cache_dir, "--run", tmp_path / "run", *AS_THAT_RUN)
    assert result.exit_code == 0, result.output
    assert "warning" not in result.stderr
    for source, out in ((run_dir, "first"), (tmp_path / "run", "again")):
        run_ok("export", source, tmp_path / out, "--to", "vllm")
    assert contents(tmp_path / "again") == contents(tmp_path / "first")
    further = train_arguments(
        cache_dir,
        tmp_path / "further",
        **SETTINGS | {"train__max_steps": 1},
        draft__init_from=tmp_path / "run",
    )
    run_ok(*further)


@pytest.mark.parametrize(
    ("nested", "fields", "code", "parts"),
    [
        ({"conv_kernel_size": None}, {}, 1, ["has no dflash_config.conv_kernel_size", "not a DFlash2 draft"]),
        ({"selector_rank": None}, {}, 1, ["has no dflash_config.selector_rank"]),
        ({"selector_rank": 9}, {}, 1, ["codebook", "is of shape"]),
        ({"conv_group_size": 5}, {}, 2, ["conv_group_size must divide the target's hidden size 32, got 5"]),
        ({"selector_top_k": 326}, {}, 2, ["selector_top_k must be at most 325"]),
        ({"conv_kernel_size": "two"}, {}, 2, ["conv_kernel_size"]),
        ({"input_embedding_scale": 2.0}, {}, 1, ["embedding_scale: 2.0 there, 1.0 here"]),
        ({"output_multiplier": 0.5}, {}, 1, ["logit_scale: 0.5 there, 1.0 here"]),
        ({"final_logit_softcapping": 30.0}, {}, 1, ["final_logit_softcapping: 30.0 there, None here"]),
        ({"attention_sink_bias": True}, {}, 1, ["attention_sink_bias = True"]),
        ({}, {"architectures": ["DFlashDraftModel"]}, 1, ["conv_kernel_size = 2, expected 0"]),
        ({}, {"draft_vocab_size": 100}, 2, ["draft_vocab_size must not be set"]),
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
