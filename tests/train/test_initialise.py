"""First weights by regression: the regression itself, and what a draft does with it before any training."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity

from pipeline.cache import CacheReader
from tests.conftest import run_ok
from tests.train.drafts import moved_by_distance
from tests.train.runs import lines_of, train_arguments
from train.draft.blocks import regression, ridge
from train.draft.blocks.regression import (
    ALL,
    ANCHOR,
    MASK,
    PENALTY,
    TOKEN_PENALTY,
    collect,
    regress,
    regular_root,
)
from train.draft.blocks.ridge import ridge_initialise, row_distances
from train.draft.dspark.markov import MARKOV_HEADS, VanillaMarkovHead
from train.draft.settings import run_config
from train.trainer.setup import build_draft, set_up


@pytest.fixture(scope="module")
def reader(cache_dir: Path) -> CacheReader:
    return CacheReader(cache_dir)


def random_draft(reader: CacheReader, **settings):
    train = {"held_out": 0.2, "anchors_per_batch": 64}
    values = {"block_size": 3, "markov_rank": 8, "num_layers": 1, **settings}
    if values.get("kind") == "dflash":
        values.pop("markov_rank")
    config = run_config({"draft": values, "train": train})
    return build_draft(set_up(reader.path, config, torch.device("cpu")))


def draft(reader: CacheReader, **settings):
    model = random_draft(reader, **settings)
    ridge_initialise(model, reader, np.arange(len(reader)))
    return model


def found(model, reader: CacheReader):
    """Moments and rows of all samples, with the distances of the draft's rows."""
    distances, layer_ids = row_distances(model), tuple(model.config.target_layer_ids)
    moments, rows = collect(reader, np.arange(len(reader)), layer_ids, model.embed_tokens, distances)
    return moments, rows, distances


@pytest.mark.parametrize("settings", [{}, {"kind": "dflash"}, {"block_size": 1}])
def test_moments_are_means_over_rows(reader: CacheReader, settings: dict) -> None:
    model = random_draft(reader, **settings)
    moments, rows, distances = found(model, reader)
    embedding = model.embed_tokens.weight.double().numpy()
    near, far, tokens, states = [], [], [], []
    for i in range(len(reader)):
        sample = reader.read(i)
        for row, p in enumerate(sample.last_positions.tolist()):
            if p > model.slots:
                seen = [sample.context[p - 1 - d].double().numpy() for d in range(model.slots)]
                near.append(seen)
                far.append(seen[-1])
                tokens.append(int(sample.input_ids[p]))
                states.append(sample.last_hidden[row].double().numpy())
    x, far, y = np.array(near), np.array(far), np.array(states)
    e = embedding[tokens] - embedding[tokens].mean(0)
    both = np.concatenate([e, y], axis=1)

    def same(got: torch.Tensor, wanted: np.ndarray) -> None:
        assert np.abs(got.double().numpy() - wanted).max() < 1e-4 * np.abs(wanted).max()

    same(moments.features, far.T @ far / len(x))
    same(moments.tokens, e.T @ e / len(x))
    same(moments.tokens_states, e.T @ y / len(x))
    for name, each in distances.items():
        same(moments.nearest[name], x[:, list(each)].mean(1).T @ both / len(x))
    same(moments.counts, np.bincount(tokens, minlength=len(embedding)).astype(float))
    same(rows.embedded, e)
    same(rows.nearest, x[:, 0])


def test_the_regression_solves_the_normal_equations_of_all_its_maps_at_once(reader: CacheReader) -> None:
    """One system with the tokens' map and every class's, solved whole; the code eliminates class by class."""
    moments, _, distances = found(random_draft(reader), reader)
    of_tokens, of_features = regress(moments, distances, True)
    numpy = {name: each.double().numpy() for name, each in vars(moments).items() if torch.is_tensor(each)}
    gram, tokens = numpy["features"].copy(), numpy["tokens"].copy()
    for matrix, penalty in ((gram, PENALTY), (tokens, TOKEN_PENALTY)):
        matrix[np.diag_indices(len(matrix))] *= 1 + penalty
    width, hidden, count = len(gram), len(tokens), len(distances)
    whole = np.zeros((count * width + hidden,) * 2)
    wanted = np.zeros((len(whole), hidden))
    for i, (name, each) in enumerate(distances.items()):
        own, products = slice(i * width, (i + 1) * width), moments.nearest[name].double().numpy()
        whole[own, own] = len(each) * gram
        whole[own, -hidden:] = len(each) * products[:, :hidden]
        whole[-hidden:, own] = len(each) * products[:, :hidden].T
        wanted[own] = len(each) * products[:, hidden:]
    slots = sum(map(len, distances.values()))
    whole[-hidden:, -hidden:] = slots * tokens
    wanted[-hidden:] = slots * numpy["tokens_states"]
    solution = np.linalg.solve(whole, wanted)
    for got, expected in (
        *zip(of_features.values(), np.split(solution[:-hidden], count), strict=True),
        (of_tokens, solution[-hidden:]),
    ):
        assert np.abs(got.double().numpy() - expected).max() < 2e-3 * np.abs(expected).max()
    without, alone = regress(moments, distances, False)
    assert not without.any()
    lone = np.linalg.solve(gram, moments.nearest[ANCHOR][:, hidden:].double().numpy())
    assert np.abs(alone[ANCHOR].double().numpy() - lone).max() < 2e-3 * np.abs(lone).max()


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({}, id="shared values"),
        pytest.param({"num_attention_heads": 4, "num_key_value_heads": 4}, id="values of their own"),
        pytest.param({"kind": "dflash"}, id="dflash"),
        pytest.param({"block_size": 1}, id="one slot"),
        pytest.param({"markov_head": "rnn"}, id="a head that can't begin"),
    ],
)
def test_a_fresh_draft_computes_about_the_prediction(reader: CacheReader, settings: dict) -> None:
    """The direction of each row's final state, at the anchors of a sample."""
    model = draft(reader, head_dim=64, **settings)
    moments, _, distances = found(model, reader)
    _, maps = regress(moments, distances, model.sees_tokens)
    sample = reader.read(int(reader.lengths.argmax()))
    anchors = torch.arange(8, len(sample.input_ids) - 4, 3)
    blocks = torch.full((len(anchors), model.block_size), model.config.mask_token_id)
    blocks[:, 0] = sample.input_ids[anchors].long()
    with torch.no_grad():
        noise = model.embed_tokens(blocks.flatten()[None]) * model.embedding_scale
        hidden = model.hidden_states(noise, sample.context.float()[None], anchors[None])[0]
    rows = hidden[:, model.first_slot :]
    features = sample.context.float().flatten(1)[anchors - 1]
    for name, each in distances.items():
        for slot in each:
            close = cosine_similarity(rows[:, slot], features @ maps[name], dim=-1)
            assert close.median() > 0.9, (name, slot, close)


def prediction_factors(model, reader: CacheReader) -> list[float]:
    """Return by slot the least-squares factor of what is to be predicted on a fresh draft's states."""
    moments, _, distances = found(model, reader)
    of_tokens, _ = regress(moments, distances, model.sees_tokens)
    drafted: list[list[torch.Tensor]] = [[] for _ in range(model.slots)]
    wanted: list[list[torch.Tensor]] = [[] for _ in range(model.slots)]
    for i in range(len(reader)):
        sample = reader.read(i)
        row = {p: n for n, p in enumerate(sample.last_positions.tolist())}
        ends = range(model.slots)
        anchors = [p for p in row if p > model.slots and all(p + k in row for k in ends)]
        if not anchors:
            continue
        blocks = torch.full((len(anchors), model.block_size), model.config.mask_token_id)
        blocks[:, 0] = sample.input_ids[anchors].long()
        noise = model.embed_tokens(blocks.flatten()[None]) * model.embedding_scale
        hidden = model.hidden_states(noise, sample.context.float()[None], torch.tensor([anchors]).long())[0]
        for k in ends:
            at = [p + k for p in anchors]
            states = sample.last_hidden[[row[p] for p in at]].float()
            tokens = model.embed_tokens.weight[sample.input_ids[at].long()] - moments.token_mean
            drafted[k].append(hidden[:, model.first_slot + k])
            wanted[k].append(states - tokens @ of_tokens)
    factors = []
    for ours, theirs in zip(map(torch.cat, drafted), map(torch.cat, wanted), strict=True):
        factors.append(((ours * theirs).sum() / ours.square().sum()).item())
    return factors


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"kind": "dflash"}], ids=str)
@pytest.mark.parametrize("embedding_scale", [1.0, 200.0])
def test_a_fresh_draft_computes_the_prediction_in_its_size(
    reader: CacheReader, settings: dict, embedding_scale: float
) -> None:
    model = random_draft(reader, head_dim=64, **settings)
    model.embedding_scale = embedding_scale
    ridge_initialise(model, reader, np.arange(len(reader)))
    assert prediction_factors(model, reader)[0] == pytest.approx(1, abs=0.1)


@torch.no_grad()
@pytest.mark.parametrize(("mlp", "attention"), [(30_000, 1), (1, 3_000)])
def test_random_layers_do_not_drown_the_prediction(reader: CacheReader, mlp: int, attention: int) -> None:
    """A random layer adds more, the wider it is: here as much as if the draft were far wider."""
    model = random_draft(reader, head_dim=64, num_layers=3)
    for layer in model.layers:
        layer.mlp.down_proj.weight.mul_(mlp)
        layer.self_attn.v_proj.weight.mul_(attention)
    ridge_initialise(model, reader, np.arange(len(reader)))
    assert prediction_factors(model, reader)[0] == pytest.approx(1, abs=0.1)


def test_the_tokens_part_is_in_logits_of_the_targets_scale(reader: CacheReader) -> None:
    model = random_draft(reader, markov_rank=32)
    model.logit_scale = 3.0
    ridge_initialise(model, reader, np.arange(len(reader)))
    moments, _, distances = found(model, reader)
    of_tokens, _ = regress(moments, distances, True)
    embedded = model.embed_tokens.weight - moments.token_mean
    occurring = moments.counts > 0
    wanted = 3 * (embedded @ of_tokens @ model.lm_head.weight.T)[occurring]
    bias = (model.markov_head.markov_w1.weight @ model.markov_head.markov_w2.weight.T)[occurring]
    torch.testing.assert_close(bias, wanted, rtol=1e-2, atol=1e-2 * wanted.abs().max().item())


def test_the_logits_root_weighs_the_tokens_of_a_reduced_vocabulary(reader: CacheReader) -> None:
    model = random_draft(reader, draft_vocab_size=40)
    counts = torch.arange(len(model.embed_tokens.weight)).float()
    root = ridge.logit_root(model, counts).double()
    share = counts[model.kept].double().numpy() + ridge.UNSEEN
    head = model.lm_head.weight.detach().double().numpy()
    assert len(head) == len(share) == 40
    wanted = np.cov(head.T, aweights=share, ddof=0)
    assert np.abs((root @ root.T).numpy() - wanted).max() < 3e-3 * wanted.max()


@pytest.mark.parametrize("where", ["context", "last_hidden"])
def test_rows_that_are_not_finite_are_left_out(
    reader: CacheReader, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    read = CacheReader.read

    def with_one_nan(self: CacheReader, i: int, *layers):
        sample = read(self, i, *layers)
        getattr(sample, where)[len(getattr(sample, where)) // 2] = float("nan")
        return sample

    whole = found(random_draft(reader), reader)[0]
    monkeypatch.setattr(CacheReader, "read", with_one_nan)
    for settings in ({}, {"kind": "dflash"}):
        model = draft(reader, **settings)
        assert all(weight.isfinite().all() for weight in model.state_dict().values())
    left = found(random_draft(reader), reader)[0]
    assert 0 < left.counts.sum() < whole.counts.sum()


def test_no_row_sees_the_features_of_position_0() -> None:
    """They are outliers. This sample is supervised from its second token on."""
    sample = SimpleNamespace(
        context=torch.randn(9, 4),
        last_hidden=torch.randn(8, 4),
        last_positions=torch.arange(8),
        input_ids=torch.arange(9),
    )
    one = SimpleNamespace(
        candidates=np.array([8]), read=lambda *_: sample, briefly_alone=lambda _samples: nullcontext()
    )
    (_, places, states, ids), *others = regression._rows(one, [0], (0,), 3)
    assert not others
    assert places.tolist() == ids.tolist() == [4, 5, 6, 7]
    assert torch.equal(states, sample.last_hidden[4:])


def test_long_samples_are_taken_piece_by_piece(reader: CacheReader, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_draft(reader)
    whole, rows, _ = found(model, reader)
    monkeypatch.setattr(regression, "SAMPLE_CHUNK", 3)
    monkeypatch.setattr(regression, "SOME_ROWS", 5)
    pieces, some, _ = found(model, reader)
    torch.testing.assert_close(pieces.features, whole.features)
    torch.testing.assert_close(pieces.nearest, whole.nearest)
    assert torch.equal(some.nearest, rows.nearest[:5])


def test_rows_of_an_anchor_and_of_masks_are_apart_where_heads_share_values(reader: CacheReader) -> None:
    assert row_distances(random_draft(reader)) == {ANCHOR: range(1), MASK: range(1, 3)}
    own = {"num_attention_heads": 4, "num_key_value_heads": 4}
    for settings, slots in ((own, 3), ({"kind": "dflash"}, 2), ({"block_size": 1}, 1)):
        assert row_distances(random_draft(reader, **settings)) == {ALL: range(slots)}


@pytest.mark.parametrize("name", ["vanilla", "gated"])
def test_a_markov_head_of_full_rank_begins_as_the_map(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    embedding, head, of_tokens = (torch.randn(n, 6, generator=generator) for n in (40, 30, 6))
    made = MARKOV_HEADS[name](40, 6, 8, 30)  # of a higher rank than the map can have
    made.begin(
        embedding + 1,
        torch.ones(6),
        head,
        of_tokens,
        embedding.T @ embedding / 40,
        regular_root(head.T @ head / 30),
    )
    states = 30 * torch.randn(40, 6, generator=generator)
    bias = made(made.latent(made.markov_w1.weight, states))
    torch.testing.assert_close(bias, embedding @ of_tokens @ head.T, rtol=1e-4, atol=1e-4)
    bias.square().sum().backward()
    used = made.markov_w1.weight.any(0) | made.markov_w2.weight.any(0)
    assert used.all()  # with both factors zero, a rank would never be learned


def test_a_root_is_one_of_a_matrix_that_is_zero() -> None:
    """As of the embeddings of rows that all have one token."""
    assert regular_root(torch.zeros(3, 3)).isfinite().all()


def test_a_markov_head_of_less_rank_begins_as_the_best_of_its_rank() -> None:
    """Eckart and Young: over tokens that occur, no factors of that rank are closer than numpy's."""
    generator = torch.Generator().manual_seed(1)
    embedding, head, of_tokens = (torch.randn(n, 6, generator=generator) for n in (400, 300, 6))
    made = VanillaMarkovHead(400, 6, 2, 300)
    made.begin(
        embedding + 1,
        torch.ones(6),
        head,
        of_tokens,
        embedding.T @ embedding / 400,
        regular_root(head.T @ head / 300),
    )
    whole = (embedding @ of_tokens @ head.T).double().numpy()
    sizes = np.linalg.svd(whole, compute_uv=False)
    bias = (made.markov_w1.weight @ made.markov_w2.weight.T).detach().double().numpy()
    best = np.sqrt((sizes[2:] ** 2).sum())
    assert np.linalg.norm(bias - whole) == pytest.approx(best, rel=1e-3)
    first, second = (w.square().mean().item() for w in (made.markov_w1.weight, made.markov_w2.weight))
    assert first == pytest.approx(second, rel=1e-3)


def test_a_step_does_not_undo_the_projection(reader: CacheReader) -> None:
    """A first step of Adam changes every weight by the rate: here the same channels in every row."""
    model = draft(reader)
    sample = reader.read(int(reader.lengths.argmax()))
    features = sample.context.float().flatten(1)[1:]
    with torch.no_grad():
        before = model.hidden_norm(model.fc(features))
        model.fc.weight.add_(5e-4 * features.mean(0).sign())
        after = model.hidden_norm(model.fc(features))
    assert cosine_similarity(before, after, dim=-1).min() > 0.99


@pytest.mark.parametrize("heads", [{}, {"num_attention_heads": 8, "num_key_value_heads": 8}])
def test_a_block_begins_by_looking_at_what_is_nearest(reader: CacheReader, heads: dict) -> None:
    """Moving the nearest context moves a block more than moving any other position does."""
    model = draft(reader, num_layers=2, head_dim=64, **heads)
    moved = moved_by_distance(model, reader)
    assert moved[0] == max(moved)
    assert moved[0] > 2 * np.median(moved)


def test_the_same_cache_gives_the_same_weights_and_other_samples_give_others(reader: CacheReader) -> None:
    weights = [draft(reader).fc.weight for _ in range(2)]
    assert torch.equal(*weights)
    fewer = random_draft(reader)
    ridge_initialise(fewer, reader, np.arange(8))
    assert not torch.equal(fewer.fc.weight, weights[0])


def test_a_vocabulary_in_parts_gives_the_same_weights(reader: CacheReader, monkeypatch) -> None:
    whole = draft(reader)
    for module in (regression, ridge):
        monkeypatch.setattr(module, "CHUNK", 7)
    parts = draft(reader)
    bias = [m.markov_head.markov_w1.weight @ m.markov_head.markov_w2.weight.T for m in (whole, parts)]
    torch.testing.assert_close(bias[1], bias[0], rtol=1e-3, atol=1e-3)


def test_samples_too_short_to_learn_from_change_nothing(reader: CacheReader, monkeypatch) -> None:
    model, untouched = random_draft(reader), random_draft(reader)
    monkeypatch.setattr(regression, "_rows", lambda *_: iter(()))
    ridge_initialise(model, reader, np.arange(len(reader)))
    for weight, expected in zip(model.parameters(), untouched.parameters(), strict=True):
        assert torch.equal(weight, expected)


def test_a_reduced_vocabulary_begins_with_its_own_rows(reader: CacheReader) -> None:
    """The bias of the tokens that it has is what a draft of the whole vocabulary has, at full rank."""
    full, reduced = (draft(reader, markov_rank=256, **each) for each in ({}, {"draft_vocab_size": 50}))
    bias = [m.markov_head.markov_w1.weight @ m.markov_head.markov_w2.weight.T for m in (full, reduced)]
    torch.testing.assert_close(bias[1], bias[0][:, reduced.kept], rtol=1e-2, atol=1e-2)


def test_a_run_starts_from_it(tmp_path: Path, cache_dir: Path) -> None:
    first = {}
    for init in ("random", "ridge"):
        settings = {"train__max_steps": 1, "train__lr": 1e-9, "draft__init": init}
        run_ok(*train_arguments(cache_dir, tmp_path / init, **settings))
        first[init] = lines_of(tmp_path / init)[-1]["held_out"]
    assert first["ridge"]["ce_loss"] != first["random"]["ce_loss"]
    assert first["ridge"]["tau"] > first["random"]["tau"]
