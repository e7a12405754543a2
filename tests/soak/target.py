"""A tiny target that spoils some rows: by its embedding, by its tokenizer and by the memory it needs."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from tests.tiny import make_target, make_tokenizer

NAN, INFINITE, ZERO, BEYOND = "<|nan|>", "<|infinite|>", "<|zero|>", "<|beyond|>"
"""Added tokens: three whose embedding is NaN, infinite or zero, and one that the embedding has no row for."""
HEADS = 8
MAX_LENGTH = 6500
"""Maximum tokens of a sample; eager attention of as many needs 1.3 GB for each of its tensors."""
TOO_LARGE = 6000
"""Tokens, at least, of a sample that does not fit: 1.1 GB per tensor."""
ROOM_BYTES = 600 * 2**20
"""Memory that a capture may take beyond its imports: a third of what such a sample needs."""


def make_soak_target(folder: Path) -> PreTrainedTokenizerFast:
    """Save such a target in `folder`, in fp32, and return its tokenizer."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([NAN, INFINITE, ZERO])
    make_target(
        folder,
        dtype=torch.float32,
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=20,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        max_position_embeddings=MAX_LENGTH,
    )
    model = AutoModelForCausalLM.from_pretrained(folder)
    values = {NAN: float("nan"), INFINITE: float("inf"), ZERO: 0.0}
    for token, value in values.items():
        model.get_input_embeddings().weight.data[tokenizer.convert_tokens_to_ids(token)] = value
    model.save_pretrained(folder)
    tokenizer.add_tokens([BEYOND])
    tokenizer.save_pretrained(folder)
    return tokenizer
