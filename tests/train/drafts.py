"""Small drafts and samples for the tests of train/, in the reference's terms and in the project's."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Qwen3Config

from pipeline.cache import CacheReader
from tests import reference
from train.draft.blocks.model import BlockDraftModel
from train.draft.dspark.model import Qwen3DSparkModel

VOCAB, HIDDEN, LAYERS, BLOCK, MASK_ID = 31, 16, 2, 3, 5


def small_config(**overrides) -> Qwen3Config:
    """A draft of 2 layers for 2 captured layers of a target with H = 16 and V = 31."""
    values = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        "block_size": BLOCK,
        "num_anchors": 4,
        "mask_token_id": MASK_ID,
        "target_layer_ids": list(range(1, 1 + LAYERS)),
        "num_target_layers": 6,
        "markov_rank": 6,
        "markov_head_type": "vanilla",
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
    }
    return Qwen3Config(**{**values, **overrides})


def sliding(window: int, *types: str) -> dict:
    """Fields of a draft whose two layers, or those of the given types, see only a window."""
    types = types or ("sliding_attention",) * 2
    return {"use_sliding_window": True, "sliding_window": window, "layer_types": list(types)}


def small_model(seed: int = 0, **overrides) -> Qwen3DSparkModel:
    """A draft in float64 whose every weight is random, so that no term hides behind a zero."""
    model = Qwen3DSparkModel(small_config(**overrides)).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def spec_of(model: Qwen3DSparkModel) -> reference.Spec:
    """What the reference needs to know of a model."""
    config = model.config
    return reference.Spec(
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        rope_theta=config.rope_parameters["rope_theta"],
        eps=config.rms_norm_eps,
        block_size=config.block_size,
        mask_token_id=config.mask_token_id,
        markov_head=config.markov_head_type if config.markov_rank else None,
        confidence=config.enable_confidence_head,
        confidence_with_markov=config.confidence_head_with_markov,
        embed_scale=getattr(config, "embedding_scale", None) or 1.0,
        logit_scale=getattr(config, "logit_scale", None) or 1.0,
        final_logit_softcap=getattr(config, "final_logit_softcapping", None),
        windows=tuple(
            config.sliding_window if kind == "sliding_attention" else None for kind in config.layer_types
        ),
    )


def random_samples(masks: list[list[int]], seed: int = 0) -> list[reference.Sample]:
    """A sample for each loss mask."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [
        reference.Sample(
            input_ids=torch.randint(VOCAB, (len(mask),), generator=generator).tolist(),
            loss_mask=mask,
            context=normal(len(mask), LAYERS * HIDDEN),
            last_hidden=normal(len(mask), HIDDEN),
        )
        for mask in masks
    ]


def as_batch(samples: list[reference.Sample], anchors: list[list[int]]) -> dict[str, Tensor]:
    """Right-padded keyword arguments of the module; padding holds junk, which must not matter."""
    width, count = max(len(s.input_ids) for s in samples), max(map(len, anchors))

    def pad(rows: Tensor, filler: float) -> Tensor:
        tail = torch.full((width - len(rows), *rows.shape[1:]), filler, dtype=rows.dtype)
        return torch.cat([rows, tail])

    return {
        "input_ids": torch.stack([pad(torch.tensor(s.input_ids), 7) for s in samples]),
        "target_hidden_states": torch.stack([pad(s.context, 1e3) for s in samples]),
        "loss_mask": torch.stack([pad(torch.tensor(s.loss_mask), 0) for s in samples]),
        "target_last_hidden_states": torch.stack([pad(s.last_hidden, 1e3) for s in samples]),
        "anchor_positions": torch.tensor([a + [0] * (count - len(a)) for a in anchors]),
        "block_keep_mask": torch.tensor([[True] * len(a) + [False] * (count - len(a)) for a in anchors]),
    }


def as_pack(samples: list[reference.Sample], anchors: list[list[int]], padding: int = 3) -> dict[str, Tensor]:
    """The same samples end to end in one row; the padding behind them holds junk, which must not matter."""
    lengths = [len(s.input_ids) for s in samples]
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    documents = [i for i, length in enumerate(lengths) for _ in range(length)] + [-1] * padding
    positions = [start + anchor for start, own in zip(starts, anchors, strict=True) for anchor in own]

    def row(parts: list[Tensor], filler: float) -> Tensor:
        tail = torch.full((padding, *parts[0].shape[1:]), filler, dtype=parts[0].dtype)
        return torch.cat([*parts, tail])[None]

    return {
        "input_ids": row([torch.tensor(s.input_ids) for s in samples], 7),
        "target_hidden_states": row([s.context for s in samples], 1e3),
        "loss_mask": row([torch.tensor(s.loss_mask) for s in samples], 0),
        "target_last_hidden_states": row([s.last_hidden for s in samples], 1e3),
        "anchor_positions": torch.tensor([[*positions, 0, 0]]),  # two dummies
        "block_keep_mask": torch.tensor([[True] * len(positions) + [False] * 2]),
        "document_ids": torch.tensor([documents]),
    }


def moved_by_distance(model: BlockDraftModel, reader: CacheReader) -> list[float]:
    """Return how far a block's states move with the context 1, 2, .. 8 positions before its anchor."""
    sample = reader.read(int(reader.lengths.argmax()))
    context, anchor = sample.context.float()[None], 20
    noise = model.embed_tokens(torch.tensor([[5, 320, 320]]))

    def hidden(features: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return model.hidden_states(noise, features, torch.tensor([[anchor]]))

    moved = []
    for distance in range(1, 9):
        features = context.clone()
        features[0, anchor - distance] = context[0, 30 + distance]
        moved.append((hidden(features) - hidden(context)).norm().item())
    return moved
