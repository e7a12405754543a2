"""Drafts of a part of their target's vocabulary, against a loop over all of it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.cache import CacheReader
from pipeline.errors import ConfigError
from tests.train.drafts import HIDDEN, LAYERS, VOCAB, small_config
from train.draft import DRAFTS, vocabulary
from train.draft.blocks.model import BlockDraftModel
from train.draft.blocks.module import BlockTrainerModule
from train.draft.settings import run_config
from train.draft.vocabulary import check_d2t, check_vocabulary, count_labels, most_frequent, with_t2d
from train.export.engines import broken_rules
from train.losses.slots import acceptance

TOKENS = torch.tensor([0, 2, 3, 7, 11, 12, 20, 29])
KINDS = {"dspark": 3, "dflash": 4}  # rows of a block


def reduced_module(kind: str, **loss) -> BlockTrainerModule:
    """A draft of the tokens `TOKENS` with random weights and the objective of its kind, in float64."""
    config = small_config(draft_vocab_size=len(TOKENS), block_size=KINDS[kind])
    model = DRAFTS[kind].build(config).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    model.keep(TOKENS)
    embedding, head = torch.randn(2, VOCAB, HIDDEN, generator=generator, dtype=torch.float64)
    model.initialize_embeddings_and_head(embedding, head)
    return DRAFTS[kind].module(model, run_config({"draft": {"kind": kind}, "loss": loss}).loss)


def batch(length: int = 12) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {
        "input_ids": torch.randint(0, VOCAB, (1, length), generator=generator),
        "target_hidden_states": torch.randn(1, length, LAYERS * HIDDEN, generator=generator).double(),
        "loss_mask": torch.ones(1, length, dtype=torch.uint8),
        "target_last_hidden_states": torch.randn(1, length, HIDDEN, generator=generator).double(),
        "anchor_positions": torch.tensor([[1, 4, 9]]),
        "block_keep_mask": torch.ones(1, 3, dtype=torch.bool),
    }


def logits_of(model: BlockDraftModel, given: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The draft's logits `[M, Vd]`, labels `[M]` and the target's logits `[M, V]` of the supervised slots."""
    blocks = model.draft_blocks(*(given[n] for n in list(given) if n != "target_last_hidden_states"))
    logits = model.draft_logits(blocks.hidden, blocks.latent)[blocks.eval_mask]
    states = given["target_last_hidden_states"][0][blocks.teacher_positions[blocks.eval_mask]]
    return logits, blocks.target_ids[blocks.eval_mask], states @ model.target_head.T


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_over_the_drafts_tokens_with_the_teacher_renormalised(kind: str) -> None:
    loss = {"ce_alpha": 0.3, "l1_alpha": 0.7} | ({"confidence_alpha": 0.0} if kind == "dspark" else {})
    module, given = reduced_module(kind, **loss), batch()
    step = module(**given)
    step.loss.backward()
    found = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()

    model = module.draft_model
    logits, labels, teacher = logits_of(model, given)
    slot = torch.arange(model.slots).repeat(3)[: len(logits)]  # of whole blocks, and the last one's prefix
    weights = torch.exp(-slot / module.objective.decay_gamma).double()
    inside = {token: number for number, token in enumerate(TOKENS.tolist())}
    total = torch.zeros((), dtype=torch.float64)
    for row, label, target, weight in zip(logits, labels.tolist(), teacher, weights, strict=True):
        p, q = row.softmax(-1), target[TOKENS].softmax(-1)
        ce = -p[inside[label]].log() if label in inside else 0.0
        total = total + weight * (0.3 * ce + 0.7 * (p - q).abs().sum())
    (total / weights.sum()).backward()
    assert 0 < sum(label in inside for label in labels.tolist()) < len(labels)
    wanted = (total / weights.sum()).detach()
    torch.testing.assert_close(step.loss.detach(), wanted, rtol=1e-6, atol=1e-7)
    for name, parameter in module.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_measurement_counts_what_lies_outside(kind: str) -> None:
    module, given = reduced_module(kind), batch()
    module.eval()
    with torch.no_grad():
        slots = module(**given, observe=True).slots
        logits, _, teacher = logits_of(module.draft_model, given)
    p = torch.zeros(len(logits), VOCAB, dtype=torch.float64)
    p[:, TOKENS] = logits.softmax(-1)
    q = teacher.softmax(-1)
    torch.testing.assert_close(
        acceptance(slots.l1).double(), torch.minimum(p, q).sum(-1), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(slots.mass.double(), q[:, TOKENS].sum(-1), rtol=1e-5, atol=1e-6)
    assert torch.equal(slots.matches, p.argmax(-1) == q.argmax(-1))
    assert slots.matches.any() or (p.argmax(-1) != q.argmax(-1)).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_it_drafts_ids_of_the_target(kind: str, temperature: float) -> None:
    module = reduced_module(kind)
    decoder = DRAFTS[kind].decoder(module.draft_model.eval())
    decoder.extend(torch.randn(5, LAYERS * HIDDEN, dtype=torch.float64), torch.arange(5))
    drafted = decoder.draft(8, temperature, generator=torch.Generator().manual_seed(0))
    assert len(drafted.tokens) == module.draft_model.slots
    assert set(drafted.tokens.tolist()) <= set(TOKENS.tolist())
    if temperature:
        assert drafted.probs.shape == (len(drafted.tokens), VOCAB)
        outside = np.setdiff1d(np.arange(VOCAB), TOKENS.numpy())
        assert not drafted.probs[:, outside].any()
        torch.testing.assert_close(drafted.probs.sum(-1), torch.ones(len(drafted.tokens)).to(drafted.probs))


@pytest.mark.parametrize("counted", [1, 40, 2**20])
def test_the_most_frequent_labels_are_kept(cache_dir: Path, monkeypatch, counted: int) -> None:
    monkeypatch.setattr(vocabulary, "COUNTED", counted)
    reader = CacheReader(cache_dir)
    samples = np.arange(0, len(reader), 2)
    wanted: Counter[int] = Counter()
    for i in samples.tolist():
        ids, mask = reader.tokens(i)
        wanted.update(token for token, own in zip(ids.tolist(), mask.tolist(), strict=True) if own)
    counts = count_labels(reader, samples)
    assert {i: n for i, n in enumerate(counts.tolist()) if n} == dict(wanted)
    kept = most_frequent(counts, 9).tolist()
    assert kept == sorted(sorted(range(len(counts)), key=lambda i: (-wanted[i], i))[:9])


def test_numbers_and_ids() -> None:
    model = reduced_module("dflash").draft_model
    assert torch.equal(model.kept, TOKENS)
    everything = torch.arange(VOCAB)
    numbers = model.draft_ids(everything)
    assert torch.equal(numbers[TOKENS], torch.arange(len(TOKENS)))
    assert (numbers[~model.t2d] == -1).all()
    assert torch.equal(model.target_ids(numbers[TOKENS]), TOKENS)


def test_a_vocabulary_that_a_target_lacks_is_refused() -> None:
    assert check_vocabulary(None, 31) == 31
    with pytest.raises(ConfigError, match="at most 31"):
        check_vocabulary(32, 31)


@pytest.mark.parametrize("tokens", [[0, 31], [-1, 2], [4, 4]])
def test_a_hostile_table_is_refused(tokens: list[int]) -> None:
    weights = {"d2t": torch.tensor(tokens) - torch.arange(2)}
    with pytest.raises(ValueError, match="2 different tokens below 31"):
        check_d2t(weights, 31)
    with pytest.raises(ValueError, match="shape"):
        check_d2t({"d2t": weights["d2t"][None]}, 31)


def test_t2d_follows_from_d2t() -> None:
    """Also where a file says something else, as no engine reads it."""
    tokens = torch.tensor([2, 30, 5])
    found = with_t2d({"d2t": tokens - torch.arange(3), "t2d": torch.ones(31, dtype=torch.bool)}, 31)
    assert found["t2d"].nonzero().flatten().tolist() == [2, 5, 30]


@pytest.mark.parametrize("kind", KINDS)
def test_sglang_knows_no_smaller_vocabulary_of_these(kind: str) -> None:
    def broken(engine: str, **size: int) -> set[str]:
        return {rule.field for rule in broken_rules(DRAFTS[kind].rules, small_config(**size), engine)}

    assert broken("sglang", draft_vocab_size=8) - broken("sglang") == {"draft_vocab_size"}
    assert "draft_vocab_size" not in broken("vllm", draft_vocab_size=8)
