"""Arithmetic that training needs, and what devices can do: the basis of model FLOP/s utilisation.

Counted as usual (Chowdhery et al. 2022, PaLM, appendix B): two operations a multiply-add, a forward and a
backward without recomputation, matrix products and attention only.
"""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from train.data.loader import Pack
from train.draft.dspark.anchors import build_eval_mask, label_positions, restarting_positions
from train.draft.dspark.markov import MARKOV_HEADS

# Dense bf16 and TF32 FLOP/s by a part of the device's name, from NVIDIA's datasheets; the first match counts.
_PEAKS = {
    "GB200": (2.5e15, 1.25e15),
    "B200": (2.25e15, 1.125e15),
    "GH200": (9.9e14, 4.95e14),
    "H200": (9.89e14, 4.945e14),
    "H100 PCIe": (7.56e14, 3.78e14),
    "H100 NVL": (8.35e14, 4.18e14),
    "H100": (9.89e14, 4.945e14),
    "H20": (1.48e14, 7.4e13),
    "A100": (3.12e14, 1.56e14),
    "L40S": (3.62e14, 1.83e14),
    "L40": (1.81e14, 9.05e13),
    "L4": (1.21e14, 6.0e13),
    "RTX 5090": (2.09e14, 1.05e14),
    "RTX 4090": (1.65e14, 8.26e13),
    "RTX 3090": (7.1e13, 3.56e13),
}


def peak_flops(device: torch.device, precision: str, tf32: bool = True) -> float | None:
    """The device's dense FLOP/s in a precision, `bf16` or `fp32`; None where it is not known."""
    if device.type != "cuda" or (precision == "fp32" and not tf32):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peaks[precision == "fp32"] for part, peaks in _PEAKS.items() if part in name), None)


def training_flops(config: PretrainedConfig, pack: Pack) -> float:
    """Model FLOPs of one forward and backward over a pack, the teacher's logits included.

    A matrix that is trained costs its forward three times, once more each for the gradients of its input
    and itself; the frozen head costs it twice, and `fc`, whose input needs no gradient, too.

    Args:
        config: the draft's.
    """
    size, tokens = config.block_size, pack.num_tokens
    width = pack.input_ids.shape[1]
    labels, safe = label_positions(pack.anchor_positions, size, width)
    supervised = build_eval_mask(width, pack.loss_mask, labels, safe, pack.block_keep_mask, pack.document_ids)
    slots, positions = int(supervised.sum()), len(safe[supervised].unique())
    blocks = int(pack.block_keep_mask.sum())
    seen = restarting_positions(pack.document_ids).gather(1, pack.anchor_positions)[pack.block_keep_mask]

    hidden, vocab, rank = config.hidden_size, config.vocab_size, config.markov_rank
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    rows = blocks * size
    layer = 6 * rows * hidden * (2 * queries + 2 * keys + 3 * config.intermediate_size)
    layer += 6 * tokens * hidden * 2 * keys
    layer += 12 * queries * size * int((seen + size).sum())
    total = config.num_hidden_layers * layer
    total += 4 * tokens * len(config.target_layer_ids) * hidden * hidden
    total += 4 * slots * hidden * vocab + 2 * positions * hidden * vocab
    if rank:
        kind = config.markov_head_type
        total += 6 * (positions if MARKOV_HEADS[kind].by_position else slots) * rank * vocab
        total += (
            6 * rows * {"gated": (hidden + rank) * rank, "rnn": (2 * rank + hidden) * 3 * rank}.get(kind, 0)
        )
    if config.enable_confidence_head:
        total += 6 * rows * (hidden + rank * bool(config.confidence_head_with_markov))
    return float(total)
