"""The model card of an export: what was measured, for whom, and names that are odd."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch

from tests.conftest import capture_arguments, run_ok
from tests.tiny import make_target
from tests.train.exports import changed, front_matter, trained
from tests.train.runs import train_arguments


def test_the_model_card(tmp_path: Path, run_dir: Path, cache_dir: Path) -> None:
    run_ok("export", run_dir, tmp_path / "out", "--to", "vllm")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    page = json.loads((run_dir / "latest" / "training.json").read_text())
    assert front_matter(card) == {
        "base_model": "tiny-llama",
        "library_name": "dspark-pipeline",
        "tags": ["dspark", "speculative-decoding", "draft-model", "vllm", "sglang", "llama.cpp"],
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


DECODED = {
    "tokens": 100,
    "rounds": 50,
    "verified_per_round": 2.0,
    "draft_ms": 1.0,
    "verify_ms": 2.0,
    "plain_ms": 3.0,
    "speculative_ms": 1.5,
    "identical": None,
}


GREEDY = {"temperature": 0.0, "tokens_per_round": 2.3456, "speedup": 1.75, "accept_given_prefix": [0.5, None]}


SAMPLED = {"temperature": 1.0, "tokens_per_round": 2.1, "speedup": None, "accept_given_prefix": []}


LIVE = {
    "step": 3,
    "target": "tiny-llama",
    "runs": [{**DECODED, **GREEDY}, {**DECODED, **SAMPLED}],
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


def test_the_card_recommends_what_was_measured(tmp_path: Path, run_dir: Path) -> None:
    """A table per temperature, by hand; a length that was not measured has a dash."""
    run = changed(run_dir, tmp_path / "run")
    rows = [
        {"length": length, "draft_ms": 1.0, "verify_ms": 2.0, "tokens_per_round": 2.0, "speedup": speedup}
        for length, speedup in ((1, 1.25), (2, 1.5), (3, None))
    ]
    lengths = {"plain_ms": 4.0, "acceptance": "held out", "rows": rows, "num_speculative_tokens": 2}
    none = {**lengths, "acceptance": "live", "num_speculative_tokens": 0}
    runs = [{**DECODED, **GREEDY, "lengths": lengths}, {**DECODED, **SAMPLED, "lengths": none}]
    (run / "latest" / "speculation.json").write_text(json.dumps({**LIVE, "runs": runs}))
    run_ok("export", run, tmp_path / "out", "--to", "hf")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    table = "| drafted tokens a round | 1 | 2 | 3 |\n|---|---|---|---|\n| speed-up | 1.250 | 1.500 | - |\n\n"
    before, greedy, sampled = card.split(table)
    assert "At temperature 0.000, by the times of target steps there (held out acceptance)" in before
    assert greedy.startswith("Recommended for a device like it: `num_speculative_tokens` 2.\n\nAt temp")
    assert sampled.startswith("No number of drafted tokens is expected to be faster there.\n\n## Serve it")
    (run / "latest" / "speculation.json").write_text(json.dumps(LIVE))
    run_ok("export", run, tmp_path / "older", "--to", "hf")
    assert "drafted tokens a round" not in (tmp_path / "older" / "README.md").read_text(encoding="utf-8")
