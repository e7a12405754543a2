"""Mean and standard deviation of every stored state's channels, by which quantising codecs standardise.

They are measured once, before the first shard, and stored in the cache. Every process that writes or reads
the cache uses this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load
from torch import Tensor

from pipeline import files
from pipeline.cache.codecs import Codec, Statistics, get_codec
from pipeline.cache.layout import LAST_HIDDEN, context_name
from pipeline.cache.manifest import MANIFEST, STATISTICS, Identity, Manifest
from pipeline.cache.shard import MAX_HEADER_BYTES, file_bytes
from pipeline.errors import CacheError
from pipeline.text import one_line

# Samples measured, evenly spread over the cache, and the most rows of each.
SAMPLES, TOKENS = 48, 512
# Least deviation of a channel as a share of the state's median one, because nearly constant channels would
# be blown up.
FLOOR = 0.01
# Largest magnitude of a mean or deviation in a valid file. Below it, every decoded value is finite.
MAX_VALUE = 2.0**60


class StateStatistics:
    """Sums over rows of one state, in double precision."""

    def __init__(self) -> None:
        self._rows = 0
        self._sum: Tensor | float = 0.0
        self._squares: Tensor | float = 0.0
        self._shift: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Add rows `[n, H]`."""
        if not len(rows):
            return
        values = rows.detach().cpu().double()
        if self._shift is None:
            self._shift = values.mean(dim=0)  # large means squared would swallow the deviations
        values = values - self._shift  # not in place: the tensor may be the caller's
        self._rows += len(values)
        self._sum = self._sum + values.sum(dim=0)
        self._squares = self._squares + values.square().sum(dim=0)

    def result(self) -> Statistics:
        """Return mean and deviation `[H]` of the rows so far. The deviation has a floor, see `FLOOR`."""
        assert self._shift is not None, "no rows"
        mean = self._sum / self._rows
        deviation = (self._squares / self._rows - mean * mean).clamp_min_(0).sqrt_()
        floor = max(FLOOR * deviation.median().item(), 2.0**-60)
        return Statistics((mean + self._shift).float(), deviation.clamp_min_(floor).float())


def chosen_samples(number: int) -> list[int]:
    """Return the numbers, in the index, of the samples that statistics are measured from."""
    return np.unique(np.linspace(0, number - 1, min(SAMPLES, number)).round().astype(int)).tolist()


def standardised_states(identity: Identity) -> list[str]:
    """Return the names of the states whose codec needs statistics."""
    return [state for state, bound in state_codecs(identity, {}).items() if bound.codec.standardised]


class StateCodec:
    """A codec with one state's statistics, which it keeps on every device that it was used on."""

    def __init__(self, codec: Codec, statistics: Statistics | None):
        self.codec = codec
        self._statistics = {} if statistics is None else {torch.device("cpu"): statistics}

    def _on(self, device: torch.device) -> Statistics | None:
        if self._statistics and device not in self._statistics:
            self._statistics[device] = self._statistics[torch.device("cpu")].to(device)
        return self._statistics.get(device)

    def encode(self, rows: Tensor) -> dict[str, Tensor]:
        """Encode `[n, H]` into the tensors that the codec's `specs` names."""
        return self.codec.encode(rows, self._on(rows.device))

    def decode(self, parts: dict[str, Tensor], out: Tensor) -> None:
        """Decode the stored tensors of some rows into `out` `[n, H]` bfloat16."""
        self.codec.decode(parts, out, self._on(out.device))


def state_codecs(identity: Identity, statistics: Mapping[str, Statistics]) -> dict[str, StateCodec]:
    """Return the codec of each state of a cache, with its statistics, by the state's name."""
    features = identity.features
    names = dict.fromkeys([context_name(i) for i in features.layer_ids], features.context_codec)
    if features.has_last_hidden:
        names[LAST_HIDDEN] = features.last_codec
    return {state: StateCodec(get_codec(name), statistics.get(state)) for state, name in names.items()}


def statistics_bytes(statistics: Mapping[str, Statistics]) -> list[bytes | memoryview]:
    """Return the statistics file in pieces."""
    tensors = {}
    for state, values in statistics.items():
        tensors[f"{state}.mean"], tensors[f"{state}.deviation"] = values.mean, values.deviation
    return file_bytes(tensors)


def read_statistics(cache: Path, identity: Identity) -> dict[str, Statistics]:
    """Read the statistics of a cache by state; empty if no codec needs any.

    Raises:
        CacheError: the file is missing, or breaks rule 9.8 of FORMAT.md.
    """
    states, width = standardised_states(identity), identity.target.hidden_size
    if not states:
        return {}
    path = cache / STATISTICS
    names = [f"{state}.{part}" for state in states for part in ("mean", "deviation")]
    try:
        tensors = load(files.read_small(path, MAX_HEADER_BYTES + 8 + len(names) * 4 * width))
        if tensors.keys() != set(names) or any(
            (t.dtype, tuple(t.shape)) != (torch.float32, (width,)) for t in tensors.values()
        ):
            raise ValueError(f"expected fp32 tensors [{width}] {', '.join(names[:2])}, ...")
        if not all(bool((t.abs() <= MAX_VALUE).all()) for t in tensors.values()):
            raise ValueError("a mean or deviation that is not finite or beyond 2^60")
        if not all(bool((tensors[f"{state}.deviation"] > 0).all()) for state in states):
            raise ValueError("a deviation that is not positive")
    except Exception as error:  # the library's error type is not public
        raise CacheError(f"{path} is damaged ({one_line(error)}): remove it, then capture again") from None
    return {s: Statistics(tensors[f"{s}.mean"], tensors[f"{s}.deviation"]) for s in states}


def check_statistics_listed(cache: Path, manifest: Manifest) -> None:
    """Check that a complete cache lists a statistics file exactly if a codec needs one. Raises CacheError."""
    listed = any(record.file == STATISTICS for record in manifest.files)
    if manifest.status == "complete" and listed != bool(standardised_states(manifest.identity)):
        raise CacheError(
            f"{cache / MANIFEST} is damaged (its file table is wrong about {STATISTICS}): capture again"
        )
