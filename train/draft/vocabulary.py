"""A draft's vocabulary, where it is a part of its target's: the tokens that answers contain most often.

Everything that has a row per drafted token then has fewer: the output head, and what adds to its logits. The
embedding stays whole. Engines know the part by `d2t`, the distance from each of the draft's tokens to its id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from pipeline.cache import CacheReader
from pipeline.errors import ConfigError
from train.data.ahead import fetched_ahead

# Buffers of a reduced vocabulary: whole numbers, not weights.
VOCABULARY = ("d2t", "t2d")
# Tokens that are counted at a time.
COUNTED = 2**20


def draft_vocab_size(config: PretrainedConfig) -> int:
    """Return Vd, the number of tokens that a draft can draft."""
    return getattr(config, "draft_vocab_size", None) or config.vocab_size


def check_vocabulary(size: int | None, vocab_size: int) -> int:
    """Return Vd for a value of `draft.draft_vocab_size`; None is the target's.

    Raises:
        ConfigError: the target has fewer tokens.
    """
    if size is not None and size > vocab_size:
        raise ConfigError(f"draft.draft_vocab_size must be at most {vocab_size}, the target's, got {size}")
    return vocab_size if size is None else size


def count_labels(reader: CacheReader, samples: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return how often each token is supervised in samples of a cache, `[V]` int64."""
    counts = np.zeros(reader.manifest.identity.target.vocab_size, dtype=np.int64)
    samples = np.asarray(samples)
    parts = -(-int(reader.lengths[samples].sum()) // COUNTED)
    pieces = np.array_split(samples, max(1, parts))  # adding up costs V operations, so not by sample
    with reader.tokens_only():
        for some, _ in fetched_ahead(reader, ((piece.tolist(), None) for piece in pieces)):
            labels = [ids[mask.bool()].numpy() for ids, mask in map(reader.tokens, some)]
            if labels:
                counts += np.bincount(np.concatenate(labels), minlength=len(counts))
    return counts


def most_frequent(counts: np.ndarray, size: int) -> np.ndarray:
    """Return the ids of the `size` most frequent tokens, ascending. On a tie the lower id is taken."""
    return np.sort(np.argsort(-counts, kind="stable")[:size])


def kept_tokens(d2t: Tensor) -> Tensor:
    """Return the ids of a draft's tokens from their distances to their numbers, `[Vd]`."""
    return d2t + torch.arange(len(d2t), device=d2t.device)


def check_d2t(weights: Mapping[str, Tensor], vocab_size: int) -> None:
    """Check that `d2t` of a draft's weights, if there is one, names different tokens of the target.

    Raises:
        ValueError: it does not.
    """
    if "d2t" in weights:
        d2t = weights["d2t"]
        if d2t.ndim != 1 or not len(d2t):
            raise ValueError(f"d2t is of shape {list(d2t.shape)}, expected a number for each token")
        tokens = kept_tokens(d2t.long())
        if tokens.min() < 0 or tokens.max() >= vocab_size or len(tokens.unique()) != len(tokens):
            raise ValueError(f"d2t does not name {len(tokens)} different tokens below {vocab_size}")


def with_t2d(weights: dict[str, Tensor], vocab_size: int) -> dict[str, Tensor]:
    """Return a draft's weights with `t2d` by `d2t`, which `check_d2t` took: it follows, and some lack it."""
    if "d2t" not in weights:
        return weights
    inside = torch.zeros(vocab_size, dtype=torch.bool)
    inside[kept_tokens(weights["d2t"].long())] = True
    return {**weights, "t2d": inside}


class ReducedVocabulary(nn.Module):
    """Part of a draft model: its vocabulary, and the target's embedding and head.

    The model has `embed_tokens`, `lm_head` and `config`, and calls `add_vocabulary` when it is built.
    """

    embed_tokens: nn.Embedding
    lm_head: nn.Linear
    trains_head = False
    """The head is the draft's own, and starts as the target's."""

    def add_vocabulary(self, config: PretrainedConfig) -> None:
        """Make the buffers of a reduced vocabulary: the first tokens, until it is chosen or loaded."""
        size = draft_vocab_size(config)
        self.reduced = size < config.vocab_size
        if self.reduced:
            self.register_buffer("d2t", torch.zeros(size, dtype=torch.int64))
            self.register_buffer("t2d", torch.arange(config.vocab_size) < size)
        # The target's whole head `[V, H]`, for what lies outside; None until it is given, or if not needed.
        self.register_buffer("target_head", None, persistent=False)
        self.target_head: Tensor | None
        # Of that the rows of the draft's tokens, where the draft's own head is another.
        self.register_buffer("target_rows", None, persistent=False)
        self.target_rows: Tensor | None

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of the weights that are the target's."""
        return ("embed_tokens.weight", "lm_head.weight")

    @property
    def kept(self) -> Tensor | None:
        """Ids of the draft's tokens, `[Vd]` int64, ascending; None if it has all."""
        return kept_tokens(self.d2t) if self.reduced else None

    def keep(self, tokens: Tensor) -> None:
        """Set the vocabulary. The head's rows are chosen when the target's head is given.

        Args:
            tokens: ids of the draft's tokens, `[Vd]` int64, ascending.
        """
        assert self.reduced
        assert len(tokens) == len(self.d2t), "the config has another vocabulary"
        self.d2t.copy_(tokens - torch.arange(len(tokens), device=tokens.device))
        self.t2d.zero_()[tokens] = True

    def draft_ids(self, tokens: Tensor) -> Tensor:
        """Return the numbers of tokens in the draft's vocabulary, -1 for tokens outside it."""
        kept = self.kept
        if kept is None:
            return tokens
        numbers = torch.full((self.config.vocab_size,), -1, device=kept.device)
        return numbers.index_copy_(0, kept, torch.arange(len(kept), device=kept.device))[tokens]

    def target_ids(self, numbers: Tensor) -> Tensor:
        """Return the ids of tokens by their numbers in the draft's vocabulary."""
        kept = self.kept
        return numbers if kept is None else kept[numbers]

    def over_target(self, probs: Tensor) -> Tensor:
        """Return probabilities `[.., Vd]` over the target's vocabulary, `[.., V]`."""
        kept = self.kept
        if kept is None:
            return probs
        return probs.new_zeros(*probs.shape[:-1], self.config.vocab_size).index_copy(-1, kept, probs)

    def head_rows(self, head: Tensor) -> Tensor:
        """Return the rows of the draft's tokens of the target's head `[V, H]`."""
        return head if self.kept is None else head[self.kept.to(head.device)]

    @property
    def teacher_head(self) -> Tensor | None:
        """The teacher's head over the draft's tokens, `[Vd, H]`; None where that is the draft's own."""
        if not self.trains_head:
            return None
        return self.target_rows if self.reduced else self.target_head

    def initialize_embeddings_and_head(
        self, embed_tokens: nn.Module | Tensor, lm_head: nn.Module | Tensor, freeze: bool = True
    ) -> None:
        """Copy the target's embedding into the draft, and of its head the rows of the draft's tokens.

        Args:
            embed_tokens: the embedding's weight `[V, H]`, or a module that has it as `weight`.
            lm_head: the head's weight `[V, H]`, or a module that has it as `weight`.
            freeze: exclude both from training, but for a head that is the draft's own.
        """
        embedding, head = (e if isinstance(e, Tensor) else e.weight.detach() for e in (embed_tokens, lm_head))
        if self.reduced or self.trains_head:
            self.target_head = head.to(self.lm_head.weight.device)
        if self.reduced and self.trains_head:
            self.target_rows = self.head_rows(self.target_head)
        with torch.no_grad():
            self.embed_tokens.weight.copy_(embedding)
            self.lm_head.weight.copy_(self.head_rows(head))
        self.embed_tokens.weight.requires_grad_(not freeze)
        self.lm_head.weight.requires_grad_(self.trains_head or not freeze)

    def round_target_head(self) -> None:
        """Keep the target's head in bf16, the dtype of its products under autocast."""
        for name in ("target_head", "target_rows"):
            if getattr(self, name) is not None:
                setattr(self, name, getattr(self, name).to(torch.bfloat16))

    def adopt(self, other: ReducedVocabulary) -> None:
        """Share another draft's vocabulary, embedding and target's head; a head of its own starts as that."""
        if self.reduced:
            self.d2t, self.t2d = other.d2t, other.t2d
        self.embed_tokens = other.embed_tokens
        self.target_head, self.target_rows = other.target_head, other.target_rows
        if not self.trains_head:
            self.lm_head = other.lm_head
        elif self.teacher_head is not None:
            with torch.no_grad():
                self.lm_head.weight.copy_(self.teacher_head)
