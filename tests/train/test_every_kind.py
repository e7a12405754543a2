"""Each kind of draft trains from the one cache, is measured, decodes, is exported and comes back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.cache import CacheReader
from tests.conftest import FP32, run_cli, run_ok
from tests.train.runs import train_arguments
from train.draft import DRAFTS
from train.runs.open import open_draft
from train.runs.results import read_evaluation, read_speculation

# Settings of small drafts that differ from `SMALL` of tests.train.runs; None for those that a kind lacks.
CASES = {
    "dspark": {},
    "dspark, reduced": {"draft__kind": "dspark", "draft__draft_vocab_size": 40},
    "dflash": {"draft__markov_rank": None, "draft__block_size": 4},
    "dflash, reduced": {
        "draft__kind": "dflash",
        "draft__markov_rank": None,
        "draft__block_size": 4,
        "draft__draft_vocab_size": 40,
    },
    "dflash2": {
        "draft__markov_rank": None,
        "draft__block_size": 4,
        "draft__selector_rank": 8,
        "draft__selector_top_k": 5,
    },
    "eagle3": {
        **dict.fromkeys(("draft__markov_rank", "draft__block_size", "draft__num_layers")),
        "draft__ttt_steps": 3,
    },
    "eagle3, reduced": {
        "draft__kind": "eagle3",
        **dict.fromkeys(("draft__markov_rank", "draft__block_size", "draft__num_layers")),
        "draft__ttt_steps": 3,
        "draft__draft_vocab_size": 40,
    },
}


def test_every_kind_has_a_case() -> None:
    assert {name.partition(",")[0] for name in CASES} == set(DRAFTS)


@pytest.fixture(scope="module", params=list(CASES))
def run(request, tmp_path_factory, cache_dir: Path) -> Path:
    """A run of two steps."""
    path = tmp_path_factory.mktemp("kind") / "run"
    settings = {"draft__kind": request.param, "train__max_steps": 2, **CASES[request.param]}
    run_ok(*train_arguments(cache_dir, path, **settings))
    return path


def test_a_run_is_measured_and_decodes_the_targets_own_text(
    run: Path, cache_dir: Path, target_dir: Path
) -> None:
    draft = open_draft(run)
    slots = draft.kind.slots(draft.shape)
    run_ok("evaluate", "--cache", cache_dir, "--run", run, "--device", "cpu")
    evaluation = read_evaluation(draft.folder)
    assert evaluation is not None
    assert len(evaluation.accept_by_position) == slots
    options = ("--target", target_dir, "--cache", cache_dir, "--num-prompts", "2", "--max-new-tokens", "12")
    run_ok("speculate", *options, "--run", run, "--temperature", "0", "--temperature", "1", *FP32)
    greedy, sampling = read_speculation(draft.folder).runs
    assert greedy.identical == 2
    assert len(sampling.accept_given_prefix) == slots


def test_a_decoder_with_fewer_slots_drafts_the_first_tokens(run: Path, cache_dir: Path) -> None:
    """Lengths that `dspark speculate --measure` times."""
    draft, reader = open_draft(run), CacheReader(cache_dir)
    model = draft.model(reader).eval()
    decoder = draft.kind.decoder(model)
    generator = torch.Generator().manual_seed(0)
    width = len(draft.shape.target_layer_ids) * draft.target.hidden_size
    features, tokens = torch.randn(6, width, generator=generator), torch.arange(20, 26)
    decoder.extend(features, tokens)
    whole, slots = decoder.draft(30).tokens, decoder.slots
    assert len(whole) == slots == draft.kind.slots(draft.shape)
    for few in range(1, slots):
        decoder.slots = few
        assert decoder.draft(30).tokens.tolist() == whole[:few].tolist()
        sampled = decoder.draft(30, 1.0, generator=generator)
        assert (len(sampled.tokens), len(sampled.probs)) == (few, few)


def test_it_is_scheduled(run: Path, cache_dir: Path, tmp_path: Path) -> None:
    table = tmp_path / "sps.json"
    table.write_text('{"token_counts": [1, 64], "step_time_ms": [5, 9]}')
    command = ("schedule", "--cache", cache_dir, "--run", run, "--device", "cpu", "--sps", table)
    result = json.loads(run_ok(*command, "--requests", "2", "--steps", "20", "--json"))
    draft = open_draft(run)
    fixed = [row["length"] for row in result["policies"] if row["policy"] == "fixed"]
    assert fixed == list(range(1, draft.kind.slots(draft.shape) + 1))
    others = {row["policy"] for row in result["policies"]} - {"none", "fixed"}
    assert others == ({"algorithm 1", "global"} if result["calibrated"] is not None else set())
    assert (result["calibrated"] is not None) == draft.kind.decoder(draft.model()).has_confidence


def test_an_export_comes_back_with_the_same_weights(run: Path, cache_dir: Path, tmp_path: Path) -> None:
    draft = open_draft(run)
    arguments = ("export", run, tmp_path / "export", "--to", "hf", "--dtype", "float32")
    reduced, own_head = "d2t" in draft.weights, "lm_head.weight" in draft.weights
    if reduced and not own_head:
        refused = run_cli(*arguments)
        assert refused.exit_code == 2
        assert "40 of the target's tokens" in refused.stderr
        assert "--with-embeddings --cache CACHE" in refused.stderr
    run_ok(*arguments, *(("--with-embeddings", "--cache", cache_dir) if reduced else ()))
    values = json.loads((tmp_path / "export" / "config.json").read_text())
    assert values["architectures"] == [draft.kind.architectures[0]]
    assert values.get("draft_vocab_size", values["vocab_size"]) == (40 if reduced else values["vocab_size"])
    assert f"# {draft.kind.title} draft for" in (tmp_path / "export" / "README.md").read_text()
    found = load_file(tmp_path / "export" / "model.safetensors")
    if reduced:  # the rows of the target's head, by the offsets that vLLM adds
        head = CacheReader(cache_dir).frozen()["lm_head.weight"].float()
        tokens = torch.arange(40) + found["d2t"]
        if not own_head:
            assert torch.equal(found.pop("lm_head.weight"), head[tokens])
        assert torch.equal(found["t2d"].nonzero().squeeze(1), tokens)
        del found["embed_tokens.weight"]
    assert found.keys() == draft.weights.keys()
    held_out = ("--set", "train.held_out=0.2")
    run_ok("import", tmp_path / "export", "--cache", cache_dir, "--run", tmp_path / "imported", *held_out)
    back = open_draft(tmp_path / "imported")
    assert back.kind is draft.kind
    ours, theirs = ({**each.shape.to_dict(), "num_anchors": None} for each in (draft, back))
    assert ours == theirs
    assert back.weights.keys() == draft.weights.keys()
    for name, weight in draft.weights.items():
        assert torch.equal(weight, back.weights[name]), name
