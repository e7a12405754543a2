"""From the cache's memory map to device batches, with their anchors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from pipeline.cache import CacheReader, last_positions
from train.anchors import build_eval_mask, label_positions
from train.losses import slot_weights

# Given a sample's number, its candidates [C] ascending and its id: the anchors to use, ascending.
AnchorChoice = Callable[[np.ndarray, bytes], np.ndarray]


@dataclass
class Blocks:
    """Padded samples and where their blocks start. B rows, S tokens, N anchors."""

    input_ids: Tensor  # [B, S] int64
    loss_mask: Tensor  # [B, S] uint8
    anchor_positions: Tensor  # [B, N] int64
    block_keep_mask: Tensor  # [B, N] bool

    def eval_mask(self, block_size: int) -> Tensor:
        """The supervised slots `[B, N, K]` that a forward will have."""
        seq_len = self.input_ids.shape[1]
        labels, safe = label_positions(self.anchor_positions, block_size, seq_len)
        return build_eval_mask(seq_len, self.loss_mask, labels, safe, self.block_keep_mask)

    def weight(self, block_size: int, gamma: float | None) -> Tensor:
        """The sum of slot weights, known before any forward: the loss's denominator."""
        return (self.eval_mask(block_size) * slot_weights(block_size, gamma)).sum()


@dataclass
class Batch(Blocks):
    """Blocks with the target's states. Fields are named as the module's arguments."""

    target_hidden_states: Tensor  # [B, S, L*H] bfloat16
    target_last_hidden_states: Tensor  # [B, S, H] bfloat16, zero where no loss can use it

    def to(self, device: torch.device) -> Batch:
        """The batch on another device."""
        if device.type == "cpu":
            return self
        return Batch(**{k: v.pin_memory().to(device, non_blocking=True) for k, v in self.arguments().items()})

    def arguments(self) -> dict[str, Tensor]:
        """Keyword arguments of `DSparkTrainerModule.forward`."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


def random_anchors(num_anchors: int, seed: int, epoch: int) -> AnchorChoice:
    """Training's choice: uniform without replacement, from (seed, epoch, sample id) alone.

    So neither packing, resuming, nor the number of ranks can change a sample's anchors.
    """

    def choose(candidates: np.ndarray, sample_id: bytes) -> np.ndarray:
        if len(candidates) <= num_anchors:
            return candidates
        rng = np.random.default_rng((seed, epoch, int.from_bytes(sample_id, "big")))
        return np.sort(rng.choice(candidates, num_anchors, replace=False))

    return choose


def spread_anchors(num_anchors: int) -> AnchorChoice:
    """Evaluation's choice: evenly spread over the candidates, the same every time."""

    def choose(candidates: np.ndarray, _sample_id: bytes) -> np.ndarray:
        count = min(num_anchors, len(candidates))
        return candidates[np.linspace(0, len(candidates) - 1, count).round().astype(np.int64)]

    return choose


def load_blocks(reader: CacheReader, samples: Sequence[int], choose: AnchorChoice) -> Blocks:
    """Read samples' tokens, right-padded, and choose their anchors. No features are touched."""
    lengths = [int(reader.lengths[i]) for i in samples]
    rows, width = len(samples), max(lengths)
    input_ids = torch.zeros(rows, width, dtype=torch.int64)
    loss_mask = torch.zeros(rows, width, dtype=torch.uint8)
    chosen = []
    for row, (i, length) in enumerate(zip(samples, lengths, strict=True)):
        ids, mask = reader.tokens(i)
        input_ids[row, :length] = ids
        loss_mask[row, :length] = mask
        supervised = mask.numpy().astype(bool)
        candidates = np.flatnonzero(supervised[:-1] & supervised[1:])
        chosen.append(choose(candidates, reader.sample_ids[i].tobytes()))
    anchors = torch.zeros(rows, max(map(len, chosen)), dtype=torch.int64)
    keep = torch.zeros(anchors.shape, dtype=torch.bool)
    for row, positions in enumerate(chosen):
        anchors[row, : len(positions)] = torch.from_numpy(positions)
        keep[row, : len(positions)] = True
    return Blocks(input_ids, loss_mask, anchors, keep)


def load_batch(
    reader: CacheReader, samples: Sequence[int], layer_ids: Sequence[int], choose: AnchorChoice
) -> Batch:
    """Read samples into one batch, each feature row decoded straight into its place."""
    blocks = load_blocks(reader, samples, choose)
    rows, width = blocks.input_ids.shape
    hidden = reader.hidden_size
    context = torch.zeros(rows, width, len(layer_ids) * hidden, dtype=torch.bfloat16)
    last_hidden = torch.zeros(rows, width, hidden, dtype=torch.bfloat16)
    for row, i in enumerate(samples):
        length = int(reader.lengths[i])
        reader.read_context(i, layer_ids, context[row, :length])
        states = torch.empty(reader.num_last_rows(i), hidden, dtype=torch.bfloat16)
        reader.read_last_hidden(i, states)
        last_hidden[row, last_positions(blocks.loss_mask[row, :length])] = states
    return Batch(**vars(blocks), target_hidden_states=context, target_last_hidden_states=last_hidden)


def prefetch(jobs: Iterable[Callable[[], Batch]], depth: int = 2) -> Iterator[Batch]:
    """Run loading jobs in order on a thread, `depth` ahead. An error is raised where its batch was due."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches") as pool:
        pending = []
        try:
            for job in jobs:
                pending.append(pool.submit(job))
                if len(pending) > depth:
                    yield pending.pop(0).result()
            while pending:
                yield pending.pop(0).result()
        finally:
            for future in pending:
                future.cancel()
