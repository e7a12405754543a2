"""DFlash's first weights: the regression, and where a fresh draft looks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.cache import CacheReader
from tests.conftest import run_ok
from tests.train.dflash.test_run import KIND
from tests.train.drafts import moved_by_distance
from tests.train.runs import lines_of, train_arguments
from train.draft.dflash.ridge import PENALTY, ridge_initialise
from train.draft.settings import run_config
from train.trainer.setup import build_draft, set_up


@pytest.fixture(scope="module")
def reader(cache_dir: Path) -> CacheReader:
    return CacheReader(cache_dir)


def draft(reader: CacheReader, **settings):
    values = {"kind": "dflash", "block_size": 3, **settings}
    config = run_config({"draft": values, "train": {"held_out": 0.2, "anchors_per_batch": 64}})
    model = build_draft(set_up(reader.path, config, torch.device("cpu")))
    ridge_initialise(model, reader, np.arange(len(reader)))
    return model


def test_fc_is_numpys_least_squares(reader: CacheReader) -> None:
    model = draft(reader, num_layers=1)
    features, states = [], []
    for i in range(len(reader)):
        sample = reader.read(i)
        for row, position in enumerate(sample.last_positions.tolist()):
            if position >= 2:
                features.append(sample.context[position - 1].double().numpy())
                states.append(sample.last_hidden[row].double().numpy())
    x, y = np.stack(features), np.stack(states)
    rms = np.sqrt((x**2).mean(axis=0))
    penalty = np.sqrt(PENALTY * len(x)) * np.eye(x.shape[1])
    wanted, *_ = np.linalg.lstsq(
        np.vstack([x / rms, penalty]), np.vstack([y, np.zeros((len(penalty), y.shape[1]))]), rcond=None
    )
    got = model.fc.weight.double().detach().numpy()
    assert np.abs(got * rms - wanted.T).max() < 1e-3 * np.abs(wanted).max()
    assert model.norm.weight.tolist() == pytest.approx([np.sqrt((y**2).mean())] * y.shape[1], rel=1e-4)


def test_a_block_begins_by_looking_at_what_is_nearest(reader: CacheReader) -> None:
    """Moving the nearest context moves a block more than moving any other position does."""
    model = draft(reader, num_layers=2, head_dim=64)
    moved = moved_by_distance(model, reader)
    assert moved[0] == max(moved)
    assert moved[0] > 2 * np.median(moved)


def test_a_run_starts_from_it(tmp_path: Path, cache_dir: Path) -> None:
    first = {}
    for init in ("random", "ridge"):
        settings = {"train__max_steps": 1, "train__lr": 1e-9, "draft__init": init}
        run_ok(*train_arguments(cache_dir, tmp_path / init, **KIND | settings))
        first[init] = lines_of(tmp_path / init)[-1]["held_out"]
    assert first["ridge"]["ce_loss"] != first["random"]["ce_loss"]
    assert first["ridge"]["tau"] > first["random"]["tau"]
