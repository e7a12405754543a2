"""`dspark export --to tensorrt-llm`: DeepSpec's layout, what it can't serve, and what the card says of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.conftest import assert_refused, run_cli, run_ok
from tests.train.exports import changed, contents, trained
from train.draft import DRAFTS
from train.export.engines import broken_rules
from train.runs.open import open_draft

TO = ("--to", "tensorrt-llm")
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "rope_theta": 5e5}
WINDOW = {"layer_types": ["sliding_attention"], "sliding_window": 9, "use_sliding_window": True}


def card_of(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def commands_of(card: str) -> str:
    """The part of a card on TensorRT-LLM."""
    return card[card.index("source of TensorRT-LLM 1.4.0rc4") :]


def test_it_is_the_layout_of_the_others_with_its_own_settings(tmp_path: Path, run_dir: Path) -> None:
    run_ok("export", run_dir, tmp_path / "out", *TO)
    run_ok("export", run_dir, tmp_path / "hf", "--to", "hf")
    assert contents(tmp_path / "out") == contents(tmp_path / "hf")
    said = commands_of(card_of(tmp_path / "out"))
    block = [line[4:] for line in said.splitlines() if line.startswith("    ") and "trtllm-serve" not in line]
    assert yaml.safe_load("\n".join(block)) == {
        "speculative_config": {
            "decoding_type": "DSpark",
            "max_draft_len": 3,
            "speculative_model": "DRAFT_DIR",
        }
    }
    assert "trtllm-serve tiny-llama --extra_llm_api_options speculative.yaml" in said
    assert "last 2,048 positions" in said
    assert "TRTLLM_DSPARK_QWEN3_CTX_WINDOW" in said
    assert "calibration.json" not in said


def test_temperatures_come_in_a_form_that_it_reads(tmp_path: Path, run_dir: Path) -> None:
    """Its reader takes SGLang's key, one positive number a slot."""
    run = changed(run_dir, tmp_path / "run")
    (run / "latest" / "calibration.json").write_text(json.dumps({"temperatures": [1.5, 0.8, 2.0]}))
    run_ok("export", run, tmp_path / "out", *TO)
    assert json.loads((tmp_path / "out" / "calibration.json").read_text())["temperatures"] == [1.5, 0.8, 2.0]
    assert "`calibration.json` has the form of the file that `confidence_calibration_path`" in commands_of(
        card_of(tmp_path / "out")
    )


@pytest.mark.parametrize("head", ["rnn_dir", "bare_dir"])
def test_it_takes_every_head_and_none(tmp_path: Path, head: str, request: pytest.FixtureRequest) -> None:
    run_ok("export", request.getfixturevalue(head), tmp_path / "out", *TO)


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"rope_parameters": YARN}, ["rope_parameters is", "yarn", "rope_theta alone"]),
        (WINDOW, ["layer_types is ['sliding_attention']", "draft.sliding_window not set"]),
        ({"target_layer_ids": [-1, 0, 2]}, ["target_layer_ids is [-1, 0, 2]", "within [0, 4]"]),
        ({"target_layer_ids": [0, 2, 5]}, ["target_layer_ids is [0, 2, 5]"]),
        ({"mask_token_id": 325}, ["mask_token_id is 325"]),
        ({"embedding_scale": 5.5}, ["embedding_scale is 5.5"]),
        ({"logit_scale": 0.5}, ["logit_scale is 0.5"]),
        ({"final_logit_softcapping": 30.0}, ["final_logit_softcapping is 30.0"]),
    ],
    ids=str,
)
def test_what_it_cant_serve_is_refused_by_name(
    tmp_path: Path, run_dir: Path, fields: dict, parts: list[str]
) -> None:
    run = changed(run_dir, tmp_path / "run", **fields)
    refused = run_cli("export", run, tmp_path / "out", *TO)
    assert_refused(refused, 2, "tensorrt-llm can't serve this draft", *parts)
    assert not (tmp_path / "out").exists()
    run_ok("export", run, tmp_path / "hf", "--to", "hf")
    assert f"TensorRT-LLM can't serve it: {next(iter(fields))} is" in card_of(tmp_path / "hf")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_dtypes_than_bfloat16_are_refused(tmp_path: Path, run_dir: Path, dtype: str) -> None:
    refused = run_cli("export", run_dir, tmp_path / "out", *TO, "--dtype", dtype)
    assert_refused(refused, 2, f"tensorrt-llm can't serve this draft in {dtype}", "export --dtype bfloat16")
    assert not (tmp_path / "out").exists()


def test_other_kinds(tmp_path: Path, cache_dir: Path) -> None:
    """One less is drafted where the anchor drafts nothing; a chain's layers are counted from 0."""
    kinds = dict.fromkeys(("draft__markov_rank", "draft__block_size"))
    blocks = trained(
        tmp_path / "blocks", cache_dir, **kinds | {"draft__kind": "dflash", "draft__block_size": 4}
    )
    run_ok("export", blocks, tmp_path / "out", *TO)
    said = commands_of(card_of(tmp_path / "out"))
    assert "decoding_type: DFlash\n      max_draft_len: 3\n" in said
    assert "2,048" not in said
    chain = trained(tmp_path / "chain", cache_dir, **kinds, draft__kind="eagle3", draft__num_layers=None)
    run_ok("export", chain, tmp_path / "chained", *TO)
    said = commands_of(card_of(tmp_path / "chained"))
    assert (
        "decoding_type: Eagle3\n      max_draft_len: 7\n      eagle3_layers_to_capture: [0, 2, 4]\n" in said
    )
    for field in ("fc_norm", "norm_output"):  # tensors of fc_norm would be missing, so only the rule is asked
        config = open_draft(chain).shape
        setattr(config, field, True)
        assert [rule.field for rule in broken_rules(DRAFTS["eagle3"].rules, config, "tensorrt-llm")] == [
            field
        ]
    newer = trained(
        tmp_path / "newer", cache_dir, **kinds | {"draft__kind": "dflash2", "draft__block_size": 4}
    )
    assert_refused(
        run_cli("export", newer, tmp_path / "no", *TO), 2, "neither the convolutions nor the selector"
    )
    small = trained(tmp_path / "small", cache_dir, draft__draft_vocab_size=40)
    head = ("--with-embeddings", "--cache", cache_dir)
    assert_refused(run_cli("export", small, tmp_path / "no", *TO, *head), 2, "draft_vocab_size is 40")
