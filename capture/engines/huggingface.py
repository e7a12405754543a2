"""The target in this process, run by transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from capture.data.conversations import TokenizedSample
from capture.engines.beginnings import Beginnings, padded
from capture.engines.engine import States
from capture.engines.proof import prove_states
from capture.target import HFDSparkTargetModel
from pipeline.cache import Identity
from pipeline.cache.statistics import StateCodec
from pipeline.hooks import input_device
from pipeline.rope import RopeLengths


class HuggingFaceEngine:
    """A `CaptureEngine` on transformers: a batch is one padded forward.

    Args:
        model: any decoder-only Hugging Face model; put in eval mode.
        layer_ids: strictly increasing ids in the convention of `pipeline.features`.

    Raises:
        TargetError: the model's layers or final norm can't be found.
        LayerIdError: ids out of range or out of order.
    """

    def __init__(self, model: nn.Module, layer_ids: Sequence[int]):
        self.target = HFDSparkTargetModel(model, layer_ids)
        self.layer_ids = self.target.target_layer_ids
        self.while_waiting: Callable[[], None] = lambda: None
        self._beginnings: Beginnings | None = None

    def share_beginnings(self, batch_tokens: int, rope: RopeLengths) -> None:
        """Read what all samples of a batch begin with once, from now on. Arguments as in `Beginnings`."""
        self._beginnings = Beginnings(self.target, batch_tokens, rope)

    @property
    def device(self) -> torch.device:
        """The device for token ids: the embedding's, even if the model is spread over several."""
        return input_device(self.target.model)

    @property
    def leak(self) -> str:
        name = type(self.target.model).__name__
        if self._beginnings is not None and self._beginnings.carried:
            return f"{name} does not carry on from its keys and values: capture without --share-prefixes"
        return f"{name} lets padding into its states: capture with --batch-tokens 2 (one row at a time)"

    @property
    def embedding(self) -> Tensor:
        return self.target.get_input_embeddings().weight

    @property
    def head(self) -> Tensor:
        return self.target.get_output_embeddings().weight

    def expect(self, batches: Sequence[Sequence[TokenizedSample]]) -> None:
        """Do nothing: a forward begins when it is asked for."""

    def states(self, batch: Sequence[TokenizedSample]) -> States:
        """As in `CaptureEngine`."""
        if self._beginnings is None:
            return self._whole(batch)
        found = self._beginnings.states(batch)
        return found or _joined([self._whole(part) for part in self._beginnings.parts(batch)])

    def _whole(self, batch: Sequence[TokenizedSample]) -> States:
        """Run samples from their first token, as one padded forward."""
        states = self._forward(pad(batch, self.device))
        lengths = [len(sample.input_ids) for sample in batch]
        width = max(lengths)
        return States(states, np.concatenate([row * width + np.arange(n) for row, n in enumerate(lengths)]))

    def _forward(self, input_ids: Tensor) -> dict[int | str, Tensor]:
        """Return the states `[B, S, H]` of right-padded rows."""
        return self.target.states(input_ids)

    def prove(
        self,
        identity: Identity,
        samples: Sequence[TokenizedSample],
        last_codec: StateCodec | None,
        rope: RopeLengths,
    ) -> dict[str, float]:
        """As in `CaptureEngine`: see `prove_states`."""
        return prove_states(self, identity, samples, last_codec, rope)

    def close(self) -> None:
        """Do nothing: the model ends with the process."""


def pad(samples: Sequence[TokenizedSample], device: torch.device) -> Tensor:
    """Right-pad samples to `input_ids` `[B, S]` on `device`."""
    return padded([sample.input_ids for sample in samples], device)


def _joined(parts: Sequence[States]) -> States:
    """Join the states of several forwards."""
    if len(parts) == 1:
        return parts[0]
    taken = [part.take_all() for part in parts]
    return States({key: torch.cat([states[key] for states in taken]) for key in taken[0]})
