"""The speculators library drafts with an export as this project's decoders do, where it is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.cache import CacheReader
from tests.conftest import run_cli, run_ok
from tests.train.exports import KINDS, trained
from train.runs.open import TrainedDraft, open_draft

speculators = pytest.importorskip("speculators")
CASES = {**KINDS, "gated": {"draft__markov_head": "gated"}, "rnn": {"draft__markov_head": "rnn"}}
CONTEXT, ROUNDS = 11, 12


@pytest.fixture(scope="module", params=CASES)
def drafts(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    cache_dir: Path,
    target_dir: Path,
) -> tuple[TrainedDraft, Any]:
    """A run's draft, and the library's model of its export with the target's embedding and head."""
    folder = tmp_path_factory.mktemp("kind")
    run = trained(folder / "run", cache_dir, **CASES[request.param])
    embeddings = ("--with-embeddings", "--cache", cache_dir)
    run_ok("export", run, folder / "out", "--to", "speculators", "--dtype", "float32", *embeddings)
    config = speculators.SpeculatorModelConfig.from_pretrained(folder / "out")
    config.transformer_layer_config._attn_implementation = "eager"
    config.speculators_config.verifier.name_or_path = str(target_dir)
    model = speculators.SpeculatorModel.from_pretrained(folder / "out", config=config)
    return open_draft(run), model.eval()


def block(model: Any, features: Tensor, anchor: int) -> tuple[Tensor, Tensor]:
    """The library's states `[B, H]` and logits `[B, V]` of a block after a context, before any head."""
    total = CONTEXT + 1 + model.block_size
    states = torch.zeros(1, total, features.shape[1])
    states[0, :CONTEXT] = features
    ids, mask = torch.zeros(1, total, dtype=torch.long), torch.zeros(1, total)
    ids[0, CONTEXT], mask[0, CONTEXT] = anchor, 1
    last = torch.zeros(1, total, model.hidden_size)
    documents = torch.zeros(1, total, dtype=torch.long)
    hidden, logits, *_ = model._backbone_forward(states, ids, mask, last, documents, max_anchors=1)
    return hidden[0], logits[0]


def drafted_by_blocks(model: Any, features: Tensor, anchor: int) -> list[int]:
    hidden, logits = block(model, features, anchor)
    if hasattr(model, "candidate_selector"):
        tokens = [anchor]
        for state, row in zip(hidden[1:], logits[1:], strict=True):
            ids, scores = model.candidate_selector.select(row, state, torch.tensor(tokens[-1]))
            tokens.append(int(ids[scores.argmax()]))
        return tokens[1:]
    if not model.config.sample_from_anchor:
        return logits[1:].argmax(-1).tolist()
    tokens = [anchor]
    for slot in range(model.block_size):
        before = {"prev_token_ids": torch.tensor([tokens]), "hidden_states": hidden[None, : slot + 1]}
        tokens.append(int((logits[slot] + model.markov_head.block_bias(**before)[0, -1]).argmax()))
    return tokens[1:]


def drafted_by_chain(model: Any, features: Tensor, ids: Tensor, anchor: int, ours: list[int]) -> list[int]:
    """Feed the library our drafted tokens, one a step; return its own."""
    total = CONTEXT + len(ours)
    states = torch.zeros(1, total, features.shape[1])
    states[0, :CONTEXT] = features
    tokens = torch.tensor([[*ids[1:].tolist(), anchor, *ours]])
    documents = torch.zeros(1, total, dtype=torch.long)
    steps = model(states, tokens, documents, ttt_steps=len(ours))
    return [int(step[0, CONTEXT - 1]) for step in steps]


@torch.no_grad()
def test_the_library_drafts_the_same_tokens(drafts: tuple[TrainedDraft, Any], cache_dir: Path) -> None:
    draft, model = drafts
    decoder = draft.kind.decoder(draft.model(CacheReader(cache_dir)).eval())
    generator, seen = torch.Generator().manual_seed(1), set()
    for _ in range(ROUNDS):
        features = 3 * torch.randn(CONTEXT, model.fc.in_features, generator=generator)
        ids = torch.randint(320, (CONTEXT + 1,), generator=generator)
        anchor = int(ids[-1])
        decoder.reset()
        decoder.extend(features, ids[:-1])
        ours = decoder.draft(anchor).tokens.tolist()
        if hasattr(model, "block_size"):
            states = decoder.block_states(anchor)
            assert torch.allclose(states, block(model, features, anchor)[0][-len(states) :], atol=1e-5)
            assert drafted_by_blocks(model, features, anchor) == ours
        else:
            assert drafted_by_chain(model, features, ids[:-1], anchor, ours) == ours
        seen.update(ours)
    assert len(seen) > 1


def test_what_the_library_saves_is_imported(
    drafts: tuple[TrainedDraft, Any], cache_dir: Path, tmp_path: Path
) -> None:
    """Its own file of the same draft: without defaults, with the library's fields, and without embeddings."""
    draft, model = drafts
    model.save_pretrained(tmp_path / "saved")
    settings = ("--set", "train.held_out=0.2", "--set", "train.precision=fp32")
    arguments = ("import", tmp_path / "saved", "--cache", cache_dir, "--run", tmp_path / "run", *settings)
    result = run_cli(*arguments)
    assert result.exit_code == 0, result.output
    assert "warning" not in result.stderr
    back = open_draft(tmp_path / "run")
    assert back.kind is draft.kind
    assert back.weights.keys() == draft.weights.keys()
    assert all(torch.equal(back.weights[name], weight) for name, weight in draft.weights.items())
    ours, theirs = ({**each.shape.to_dict(), "num_anchors": None} for each in (draft, back))
    assert ours == theirs
