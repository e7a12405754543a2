"""Counted operations against PyTorch's own counter, which watches the products as they run."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.train.drafts import as_pack, random_samples, sliding, small_config, small_model
from train.data.loader import Pack
from train.draft.blocks import attention, masks
from train.draft.blocks.flops import hidden_flops
from train.draft.dspark.flops import training_flops
from train.draft.dspark.markov import MARKOV_HEADS
from train.draft.dspark.module import DSparkTrainerModule
from train.trainer.metrics import peak_flops

MASKS = [[0, 1, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1], [1] * 9]
ANCHORS = [[1, 3, 4], [0, 1, 4], [0, 2, 5, 7]]
PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.addmm_)


@pytest.mark.parametrize("head", [*MARKOV_HEADS, None])
def test_products_are_those_that_run(head: str | None) -> None:
    """All but attention, whose hidden scores a dense kernel computes too. No dummies, no padding here."""
    settings = (
        {"markov_head_type": head} if head else {"markov_rank": 0, "confidence_head_with_markov": False}
    )
    model = small_model(**settings)
    model.embed_tokens.requires_grad_(False)
    model.lm_head.requires_grad_(False)
    batch = as_pack(random_samples(MASKS), ANCHORS, padding=0)
    for name in ("anchor_positions", "block_keep_mask"):
        batch[name] = batch[name][:, :-2]
    with FlopCounterMode(display=False) as counter:
        DSparkTrainerModule(model, 4.0)(**batch).loss.backward()
    counts = counter.get_flop_counts()["Global"]
    ran = sum(counts.get(product, 0) for product in PRODUCTS)
    tokens = batch["input_ids"].shape[1]
    collated = {name: batch[name] for name in ("anchor_positions", "block_keep_mask")}
    own = {name: batch[name] for name in ("input_ids", "loss_mask", "document_ids")}
    pack = Pack(**own, collated=collated, num_tokens=tokens)
    blocks, config = batch["anchor_positions"].shape[1], model.config
    pairs = sum(anchor + config.block_size for own in ANCHORS for anchor in own) * config.block_size
    attended = 12 * config.num_attention_heads * config.head_dim * pairs * config.num_hidden_layers
    assert blocks == sum(map(len, ANCHORS))
    wanted = training_flops(config, pack) - attended
    # The first slot's recurrent state and the blocks' input, which get no gradient, cost a little less.
    assert ran == pytest.approx(wanted, rel=0.03)


def test_a_window_leaves_only_what_is_seen() -> None:
    """Counted on paper, for K = 3, W = 4: slot k sees min(anchor, 3 - k) context positions and its block."""
    batch = as_pack(random_samples([[1] * 6, [1] * 9]), [[0, 2], [3, 7]], padding=0)
    collated = {name: batch[name] for name in ("anchor_positions", "block_keep_mask")}
    own = {name: batch[name] for name in ("input_ids", "loss_mask", "document_ids")}
    pack = Pack(**own, collated=collated, num_tokens=15)
    context = (0 + 0 + 0) + (2 + 2 + 1) + 2 * (3 + 2 + 1)  # of 3 * (0 + 2 + 3 + 7) in a full layer
    a_pair = 12 * 4 * 8  # operations for each of 4 heads of width 8, forward and backward
    configs = (small_config(), small_config(**sliding(4, "full_attention", "sliding_attention")))
    full, windowed = (training_flops(config, pack) for config in configs)
    assert full - windowed == a_pair * (36 - context)
    assert training_flops(small_config(**sliding(10)), pack) == full  # the last slot of 7 is at 9


def test_what_sdpa_computes_in_vain(monkeypatch) -> None:
    """Counted on paper: anchors 1, 4, 7, 11 of 12 tokens, K = 3, two layers of 4 heads of width 8."""
    config = small_config(num_anchors=4)
    seen = 3 * ((1 + 3) + (4 + 3) + (7 + 3) + (11 + 3))
    assert hidden_flops(config, 12) == 2 * 4 * 8 * 12 * (12 * (12 + 12) - seen)
    monkeypatch.setattr(masks, "GROUP", 2)  # the first two see 4 positions at most, the others 11
    computed = 6 * (4 + 6) + 6 * (11 + 6)
    assert hidden_flops(config, 12) == 2 * 4 * 8 * (16 * computed - 12 * seen)


def test_sdpa_in_place_of_flex_is_said_with_what_it_costs(monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setattr(attention, "flex_block_mask", fail)
    shape = {"num_anchors": 512, "block_size": 7, "num_attention_heads": 32, "head_dim": 128}
    config = small_config(**shape, num_hidden_layers=5)  # Qwen3-4B's
    with pytest.warns(UserWarning, match="using sdpa, which is slower.* 1.4 TFLOP .* 4096 tokens"):
        assert attention.resolve_attention("auto", config, torch.device("cuda")) == "sdpa"


def test_peaks_are_found_by_name(monkeypatch) -> None:
    cuda = torch.device("cuda")
    names = {
        "NVIDIA H200": 9.89e14,
        "NVIDIA H200 NVL": 8.35e14,
        "NVIDIA GH200 480GB": 9.9e14,
        "NVIDIA H100 80GB HBM3": 9.89e14,
        "NVIDIA H100 PCIe": 7.56e14,
        "NVIDIA A100-SXM4-80GB": 3.12e14,
        "NVIDIA GeForce RTX 4090": 1.65e14,
        "NVIDIA B200": 2.25e15,
        "NVIDIA L40": 1.81e14,
        "Something Else": None,
    }
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device, name=name: name)
        assert peak_flops(cuda, "bf16") == peak
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "NVIDIA A100-SXM4-80GB")
    assert peak_flops(cuda, "fp32") == 1.56e14
    assert peak_flops(cuda, "fp32", tf32=False) is None
    assert peak_flops(torch.device("cpu"), "fp32") is None
