"""Settings of a DFlash draft: the shipped config is the published one, and what no run can have."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline import config as configuration
from pipeline.errors import ConfigError
from train.draft.dflash.kind import DFLASH
from train.draft.settings import run_config

CONFIG = Path(__file__).parents[3] / "configs" / "dflash-qwen3-4b.toml"


def test_the_shipped_config_has_the_published_settings() -> None:
    config = run_config(configuration.load_toml(CONFIG), str(CONFIG))
    draft, loss, train = config.draft, config.loss, config.train
    assert (draft.kind, draft.num_layers, draft.block_size) == ("dflash", 5, 16)
    assert (draft.target_layer_ids, draft.mask_token_id) == ((1, 9, 17, 25, 33), 151_669)
    assert (loss.ce_alpha, loss.l1_alpha, loss.slot_decay) == (1.0, 0.0, 7.0)
    assert (train.lr, train.beta1, train.beta2, train.weight_decay) == (6e-4, 0.9, 0.95, 0.0)
    assert (train.warmup_ratio, train.max_grad_norm, train.epochs) == (0.04, 1.0, 6)
    assert not DFLASH.needs_last_hidden(config)
    assert DFLASH.tables.published == {
        "draft.num_layers": "5",
        "draft.block_size": "16",
        "loss.ce_alpha": "1.0",
        "loss.decay_gamma": "7.0",
        "loss.dpace_smoothing": "0.5",
    }


@pytest.mark.parametrize(
    ("table", "value", "part"),
    [
        ("draft", {"block_size": 1}, "block_size must be at least 2, an anchor and a slot, got 1"),
        ("draft", {"markov_rank": 8}, "unknown key 'markov_rank'"),
        ("loss", {"ce_alpha": 0.0}, "ce_alpha and l1_alpha can't both be 0"),
        ("loss", {"decay_gamma": 0.0}, "decay_gamma must be positive"),
        ("loss", {"dpace_smoothing": 0.0}, "dpace_smoothing must be above 0 and at most 1, got 0.0"),
        ("loss", {"dpace_smoothing": 1.5}, "dpace_smoothing must be above 0 and at most 1, got 1.5"),
        ("loss", {"slot_weights": "even"}, "slot_weights"),
        ("loss", {"confidence_alpha": 1.0}, "unknown key 'confidence_alpha'"),
        ("loss", {"l1_alpha": -1.0}, "l1_alpha"),
    ],
    ids=str,
)
def test_what_no_run_can_have(table: str, value: dict, part: str) -> None:
    tables = {"draft": {"kind": "dflash"}, "loss": {}}
    tables[table] |= value
    with pytest.raises(ConfigError, match=part.replace("(", "\\(")):
        run_config(tables)


def test_dpace_takes_the_place_of_the_decay() -> None:
    loss = run_config({"draft": {"kind": "dflash"}, "loss": {"slot_weights": "dpace"}}).loss
    assert (loss.slot_decay, loss.dpace_smoothing) == (None, 0.5)
