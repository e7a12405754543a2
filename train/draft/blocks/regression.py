"""Ridge regression of the target's states on what a block drafter can see, from the rows of a cache.

H is the hidden size, W = L*H the width of the context features, V the vocabulary, K the slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.cache import CacheReader

# Approximate maximum of rows, from samples spread evenly over the training split.
MAX_ROWS = 49_152
# Rows after which no more are kept themselves.
SOME_ROWS = 8_192
# Weights of the penalties on features and tokens, with every channel scaled to a mean square of 1.
PENALTY, TOKEN_PENALTY = 0.01, 0.003
# Rows of an embedding or a head that are in fp32 at a time.
CHUNK = 8_192
# Rows of a sample that are: their features are many times wider.
SAMPLE_CHUNK = 2_048

# Classes of a block's rows.
ANCHOR, MASK, ALL = "anchor", "mask", "all"


@dataclass
class Moments:
    """Means of products over rows. A row is a position p with a state of the target; W = L*H.

    For a block's row that drafts after p, the nearest context is 1 + d positions before p, with d = 0 for the
    first row that drafts.
    """

    features: Tensor
    """Of the features that the last row sees nearest with themselves, `[W, W]`."""
    tokens: Tensor
    """Covariance of the embeddings of the token at p, `[H, H]`."""
    tokens_states: Tensor
    """Of the embeddings, less their mean, with the states, `[H, H]`."""
    nearest: dict[str, Tensor]
    """Of the mean of each class's nearest features with embeddings, less their mean, and with states,
    `[W, 2H]`."""
    token_mean: Tensor
    """Mean of the embeddings, `[H]`."""
    counts: Tensor
    """Number of occurrences of each token, `[V]`."""


@dataclass
class Rows:
    """Some of the rows themselves."""

    nearest: Tensor
    """Features at p - 1, `[n, W]`."""
    embedded: Tensor
    """Less their mean, `[n, H]`."""
    states: Tensor
    """`[n, H]`."""
    tokens: Tensor
    """`[n]`."""


def collect(
    reader: CacheReader,
    samples: Sequence[int] | np.ndarray,
    layer_ids: tuple[int, ...],
    embed_tokens: nn.Embedding,
    distances: Mapping[str, range],
) -> tuple[Moments, Rows] | None:
    """Read the rows of samples; None if no sample is long enough to have one.

    Args:
        layer_ids: the layers that the draft reads.
        embed_tokens: the target's embedding, on the device that computes.
        distances: distances d of each class's rows, as `Moments` counts them; K in all.
    """
    device, hidden = embed_tokens.weight.device, embed_tokens.embedding_dim
    slots, width = sum(map(len, distances.values())), len(layer_ids) * reader.hidden_size
    gram = torch.zeros(width, width, device=device)
    of_both = torch.zeros(2 * hidden, 2 * hidden, device=device)
    of_nearest = {name: torch.zeros(width, 2 * hidden, device=device) for name in distances}
    sums = {name: torch.zeros(width, device=device) for name in distances}
    sum_of_both = torch.zeros(2 * hidden, device=device)
    counts = torch.zeros(embed_tokens.num_embeddings, device=device)
    kept, count = [], 0
    for context, places, states, ids in _rows(reader, samples, layer_ids, slots):
        states, ids = states.to(device).float(), ids.to(device)
        embedded = embed_tokens(ids).float()
        both = torch.cat([embedded, states], dim=1)
        last = _nearest(context, places, slots - 1, device)
        gram.addmm_(last.T, last)
        of_both.addmm_(both.T, both)
        sum_of_both += both.sum(0)
        counts += ids.bincount(minlength=len(counts))
        for name, each in distances.items():
            mean = _nearest(context, places, each.start, device)
            for d in each[1:]:
                mean += _nearest(context, places, d, device)
            mean /= len(each)
            of_nearest[name].addmm_(mean.T, both)
            sums[name] += mean.sum(0)
        if count < SOME_ROWS:
            near = _nearest(context, places, 0, device)
            kept.append([each[: SOME_ROWS - count] for each in (near, embedded, states, ids)])
        count += len(ids)
    if not count:
        return None
    mean = sum_of_both[:hidden] / count
    of_both = of_both[:hidden] / count - torch.outer(mean, sum_of_both / count)
    for name, products in of_nearest.items():
        products[:, :hidden].addr_(sums[name], mean, alpha=-1)
        products /= count
    moments = Moments(gram / count, of_both[:, :hidden], of_both[:, hidden:], of_nearest, mean, counts)
    features, embedded, states, ids = (torch.cat(each) for each in zip(*kept, strict=True))
    return moments, Rows(features, embedded - mean, states, ids)


def _nearest(context: Tensor, places: Tensor, distance: int, device: torch.device) -> Tensor:
    """Return the features `[n, W]`, in fp32, that rows at `places` see nearest at a distance of `Moments`."""
    return context[places - 1 - distance].to(device).float()


def _rows(
    reader: CacheReader, samples: Sequence[int] | np.ndarray, layer_ids: tuple[int, ...], slots: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Yield a sample's features `[S, W]`, positions of some of its rows `[n]`, and their states and tokens.

    Rows that are not finite are left out.
    """
    samples = np.asarray(samples)
    rows = reader.candidates[samples]
    share = min(1.0, MAX_ROWS / max(1, rows.sum()))
    chosen = np.unique(
        np.linspace(0, len(samples) - 1, max(1, round(share * len(samples)))).round().astype(int)
    )
    for i in samples[chosen].tolist():
        with reader.briefly_alone([i]):
            sample = reader.read(i, layer_ids)
        finite = sample.context.isfinite().all(1).long().cumsum(0)
        later = sample.last_positions > slots  # without the features of position 0, which are outliers
        places = sample.last_positions[later]
        # Of the K rows before, too.
        good = finite[places - 1] - finite[places - 1 - slots] == slots
        states = sample.last_hidden[later]
        good &= states.isfinite().all(1)
        places, states = places[good], states[good]
        for some, theirs in zip(places.split(SAMPLE_CHUNK), states.split(SAMPLE_CHUNK), strict=True):
            if len(some):
                yield sample.context, some, theirs, sample.input_ids[some].long()


def regress(
    moments: Moments, distances: Mapping[str, range], sees_tokens: bool, penalty: float = PENALTY
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the ridge regression of states on tokens and features.

    One map of the tokens serves all rows; each class has a map of its features.

    Args:
        distances: as in `collect`; a block's rows weigh alike.
        sees_tokens: False for a draft without a head for the token's part, whose map is then zero.
        penalty: weight of the penalty on features, with every channel scaled to a mean square of 1.

    Returns:
        The tokens' map `[H, H]`, and each class's `[W, H]`.
    """
    hidden = len(moments.tokens)
    scale, token_scale = (
        gram.diagonal().sqrt().clamp(min=1e-6) for gram in (moments.features, moments.tokens)
    )
    gram = moments.features / scale / scale[:, None]
    gram.diagonal().add_(penalty)
    factor = torch.linalg.cholesky(gram)
    tokens = moments.tokens / token_scale / token_scale[:, None]
    tokens.diagonal().add_(TOKEN_PENALTY)
    left, wanted = torch.zeros_like(tokens), torch.zeros_like(tokens)
    solved = {}
    for name, products in moments.nearest.items():
        # Of the features' gram matrix, against embeddings and states: what is left of either is in the rest.
        products = products / scale[:, None]
        products[:, :hidden] /= token_scale
        solved[name] = both = torch.cholesky_solve(products, factor)
        with_tokens = products[:, :hidden].T
        left += len(distances[name]) * (tokens - with_tokens @ both[:, :hidden])
        rest = moments.tokens_states / token_scale[:, None] - with_tokens @ both[:, hidden:]
        wanted += len(distances[name]) * rest
    of_tokens = torch.linalg.solve(left, wanted) if sees_tokens else torch.zeros_like(wanted)
    of_features = {
        name: (both[:, hidden:] - both[:, :hidden] @ of_tokens) / scale[:, None]
        for name, both in solved.items()
    }
    return of_tokens / token_scale[:, None], of_features


def product(matrix: Tensor, right: Tensor) -> Tensor:
    """Return matrix @ right in fp32, without a copy of the whole matrix `[V, H]` in fp32."""
    return torch.cat([rows.float() @ right for rows in matrix.split(CHUNK)])


def regular_root(gram: Tensor) -> Tensor:
    """Return the Cholesky factor of a gram matrix `[n, n]`, made regular, were it zero."""
    gram = gram.clone()
    gram.diagonal().add_(1e-3 * gram.diagonal().mean().clamp(min=1e-9))
    return torch.linalg.cholesky(gram)
