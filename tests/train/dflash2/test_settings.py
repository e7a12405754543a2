"""Settings of a DFlash2 draft: defaults, and what no run can have."""

from __future__ import annotations

import re

import pytest

from pipeline.errors import ConfigError
from tests.train.dflash2.drafts import small_model
from train.config import TrainConfig
from train.draft.dflash2.kind import DFLASH2
from train.draft.settings import run_config
from train.trainer.optimizer import build_optimizers


def test_the_defaults_are_those_of_released_drafts() -> None:
    config = run_config({"draft": {"kind": "dflash2"}})
    draft, loss = config.draft, config.loss
    assert (draft.conv_kernel_size, draft.conv_group_size) == (2, 16)
    assert (draft.selector_rank, draft.selector_top_k) == (256, 16)
    assert (loss.ce_alpha, loss.l1_alpha, loss.selector_alpha, loss.slot_decay) == (1.0, 0.0, 1.0, 7.0)
    assert not DFLASH2.needs_last_hidden(config)
    assert {name: str(getattr(draft, name.partition(".")[2])) for name in DFLASH2.tables.published} == dict(
        DFLASH2.tables.published
    )


@pytest.mark.parametrize(
    ("table", "value", "part"),
    [
        ("draft", {"conv_kernel_size": 0}, "conv_kernel_size must be at least 1, got 0"),
        ("draft", {"conv_kernel_size": 5, "block_size": 4}, "must be at most block_size = 4, got 5"),
        ("draft", {"conv_group_size": 0}, "conv_group_size must be at least 1, got 0"),
        ("draft", {"selector_rank": 0}, "selector_rank must be at least 1, got 0"),
        ("draft", {"selector_top_k": 0}, "selector_top_k must be at least 1, got 0"),
        ("draft", {"draft_vocab_size": 40}, "draft_vocab_size must not be set"),
        ("draft", {"block_size": 1}, "block_size must be at least 2"),
        ("loss", {"selector_alpha": -1.0}, "selector_alpha must not be negative, got -1.0"),
        ("loss", {"ce_alpha": 0.0}, "ce_alpha and l1_alpha can't both be 0"),
    ],
    ids=str,
)
def test_what_no_run_can_have(table: str, value: dict, part: str) -> None:
    tables = {"draft": {"kind": "dflash2"}, "loss": {}}
    tables[table] |= value
    with pytest.raises(ConfigError, match=re.escape(part)):
        run_config(tables)


def test_how_its_parameters_are_trained() -> None:
    """Codebooks have a row per token, as the Markov head has. Decay would take convolutions from identity."""
    model, config = small_model(), TrainConfig(lr=0.1, markov_lr_scale=3.0, weight_decay=0.2)
    (optimizer,) = build_optimizers(model, config, DFLASH2.lr_scales(config))
    groups = [(id(p), group) for group in optimizer.param_groups for p in group["params"]]
    assert len(groups) == len(dict(groups)) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        group = dict(groups)[id(parameter)]
        assert group["lr_scale"] == (3.0 if name.endswith("_codebook") else 1.0), name
        assert group["weight_decay"] == (0.2 if parameter.ndim == 2 else 0.0), name
    assert sum(name.endswith("base_kernel") for name, p in model.named_parameters() if p.ndim == 3) == 4
