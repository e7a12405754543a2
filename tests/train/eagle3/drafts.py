"""Small EAGLE-3 drafts and packs for their tests."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig

from train.draft.eagle3.model import Eagle3Model

VOCAB, HIDDEN, LAYERS, STEPS = 31, 16, 3, 4


def small_config(**overrides) -> LlamaConfig:
    """A draft for 3 captured layers of a target with H = 16 and V = 31."""
    values = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        "draft_vocab_size": VOCAB,
        "target_hidden_size": HIDDEN,
        "num_aux_hidden_states": LAYERS,
        "fc_norm": False,
        "norm_output": False,
        "target_layer_ids": [1, 2, 4],
        "num_target_layers": 6,
        "ttt_steps": STEPS,
        "train_head": True,
    }
    return LlamaConfig(**{**values, **overrides})


def small_model(kept: list[int] | None = None, seed: int = 0, **overrides) -> Eagle3Model:
    """A draft in float64 whose every weight is random, with a head of its own and the target's."""
    if kept is not None:
        overrides["draft_vocab_size"] = len(kept)
    model = Eagle3Model(small_config(**overrides)).double().eval()
    if kept is not None:
        model.keep(torch.tensor(kept))
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    model.initialize_embeddings_and_head(normal(VOCAB, HIDDEN), normal(VOCAB, HIDDEN))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter is not model.lm_head.weight or model.config.train_head:
                parameter.copy_(0.3 * normal(*parameter.shape))
    return model


def pack(masks: list[list[int]], padding: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """Arguments of the module: a document for each loss mask, end to end, and junk as padding."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [len(mask) for mask in masks]
    total = sum(lengths) + padding
    documents = [i for i, length in enumerate(lengths) for _ in range(length)] + [-1] * padding

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "input_ids": torch.randint(VOCAB, (1, total), generator=generator),
        "target_hidden_states": normal(1, total, LAYERS, HIDDEN),
        "loss_mask": torch.tensor([[each for mask in masks for each in mask] + [0] * padding]),
        "target_last_hidden_states": normal(1, total, HIDDEN),
        "document_ids": torch.tensor([documents], dtype=torch.int32),
    }


def chosen(anchors: list[int]) -> dict[str, Tensor]:
    """Arguments that choose anchors of a pack, and a dummy."""
    return {
        "anchor_positions": torch.tensor([[*anchors, 0]]),
        "block_keep_mask": torch.tensor([[True] * len(anchors) + [False]]),
    }
