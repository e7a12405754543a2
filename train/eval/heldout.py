"""Results of a draft at held-out anchors, block by block, from the cache alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from pipeline.cache import CacheReader
from pipeline.errors import RunError
from train.config import RunConfig
from train.data.sampling import AnchorChoice
from train.draft.kind import TrainerModule
from train.eval.validate import held_out_batches
from train.losses.slots import TERMS, SlotFigures
from train.runtime.distributed import Ranks
from train.runtime.precision import autocast


@dataclass(frozen=True)
class Blocks:
    """n blocks of K slots. Values of slots that are not `valid` mean nothing."""

    sample: np.ndarray
    """The sample number of each block, `[n]` int64."""
    position: np.ndarray
    """Its anchor, counted from the sample's start, `[n]` int64."""
    valid: np.ndarray
    """True for supervised slots, `[n, K]` bool: an unbroken prefix, of one slot at least."""
    ce: np.ndarray
    """Cross entropy with the data's token, `[n, K]` float64."""
    accept: np.ndarray
    """Probability that the target accepts the slot's token at temperature 1, `[n, K]` float64."""
    matches: np.ndarray
    """True where draft and target have the same most likely token, `[n, K]` bool."""
    confidence: np.ndarray | None
    """Confidence logits, `[n, K]` float64."""
    l1: np.ndarray | None = None
    """L1 distance `[n, K]` float64, where it is of another distribution than `accept`; None if that is
    1 - L1/2."""
    further: dict[str, np.ndarray] = field(default_factory=dict)
    """Loss terms beyond the cross entropy, L1 and confidence, by name, `[n, K]` float64."""

    def __len__(self) -> int:
        return len(self.sample)

    def select(self, which: np.ndarray) -> Blocks:
        """Return some of the blocks, by number or by a mask `[n]`."""
        own = {name: None if value is None else value[which] for name, value in self._arrays().items()}
        return Blocks(**own, further={name: value[which] for name, value in self.further.items()})

    def _arrays(self) -> dict[str, np.ndarray | None]:
        return {name: value for name, value in vars(self).items() if name != "further"}


def join(parts: Sequence[Blocks]) -> Blocks:
    """Join several into one, sorted by sample and position."""
    own = {
        name: None if value is None else np.concatenate([getattr(part, name) for part in parts])
        for name, value in parts[0]._arrays().items()
    }
    further = {name: np.concatenate([part.further[name] for part in parts]) for name in parts[0].further}
    blocks = Blocks(**own, further=further)
    return blocks.select(np.lexsort((blocks.position, blocks.sample)))


@torch.no_grad()
def measure(
    module: TrainerModule,
    reader: CacheReader,
    samples: Sequence[int] | np.ndarray,
    config: RunConfig,
    ranks: Ranks,
    choose: AnchorChoice,
    title: str = "evaluate",
) -> Blocks:
    """Draft a block at each chosen anchor of `samples`; the same on every rank.

    Blocks of a batch go through the draft `train.anchors_per_batch` at a time, as in training.

    Args:
        choose: the anchors of each sample.
        ranks: share the samples.
        title: of the bar.

    Raises:
        ConfigError: there are no samples.
        RunError: a figure is not finite.
    """
    parts: list[Blocks] = []
    module.eval()
    with ranks.together():
        packs, batches = held_out_batches(module, reader, samples, config, ranks, choose, title)
        for batch, members in zip(batches, packs, strict=True):
            starts = np.concatenate([[0], np.cumsum(reader.lengths[members])])
            for tensors in module.pieces(batch.tensors(), config.train.anchors_per_batch):
                with autocast(ranks.device, config.train.precision):
                    slots = module(**tensors, observe=True).slots
                parts.append(_blocks(slots, members, starts))
    return join([part for rank in ranks.gather(parts) for part in rank])


def _blocks(slots: SlotFigures, members: np.ndarray, starts: np.ndarray) -> Blocks:
    """Return the kept blocks of one forward over a pack.

    Args:
        members: sample numbers of the pack.
        starts: each sample's first position in it, and the last one's end.
    """
    further = {name: term(slots) for name, term in TERMS.items() if name not in ("ce", "l1", "confidence")}
    own = {"ce": slots.ce, "l1": slots.l1, "matches": slots.matches, "confidence": slots.confidence}
    own |= {"accepted": slots.accepted}
    found = {name: values for name, values in (own | further).items() if values is not None}
    # One copy for all: each of them would wait for the device. float64 holds the numbers exactly.
    table = torch.stack([slots.supervised.numbers.double(), *(each.double() for each in found.values())])
    numbers, *columns = table.cpu().numpy()
    if not np.isfinite(columns).all():
        raise RunError("the draft's figures are not finite: its weights are damaged, take another one")
    anchors = slots.anchor_positions[0].cpu().numpy()
    shape = slots.supervised.mask.shape[1:]  # [N, K]

    def laid_out(values: np.ndarray | float) -> np.ndarray:
        out = np.zeros(shape)
        out.flat[numbers.astype(np.int64)] = values
        return out

    valid = laid_out(1.0).astype(bool)
    kept = valid[:, 0]
    values = {name: laid_out(each)[kept] for name, each in zip(found, columns, strict=True)}
    own_rule = "accepted" in values
    document = np.searchsorted(starts, anchors[kept], side="right") - 1
    return Blocks(
        sample=members[document],
        position=anchors[kept] - starts[document],
        valid=valid[kept],
        ce=values["ce"],
        accept=values["accepted"] if own_rule else np.clip(1 - values["l1"] / 2, 0, 1),
        matches=values["matches"].astype(bool),
        confidence=values.get("confidence"),
        l1=values["l1"] if own_rule else None,
        further={name: values[name] for name in further if name in values},
    )
