"""Initial weights of a draft from the cache, by linear regression.

A draft with random weights spends most of a short run on learning which context matters and what it
predicts. Both are roughly known: the last context position matters most, and a linear map of its features
predicts much of the target's next state. So `draft.init = "ridge"` sets

- `fc` to the ridge regression of the target's post-norm state on the features one position before it,
- the first layer's queries and keys so that attention starts on the nearest context,
- its values and output to pass on the main directions of that prediction,
- the final norm to the target's scale.

Training then changes all of these. benchmarks/acceptance.py measures the gain.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.cache import CacheReader
from train.draft.blocks.model import BlockDraftModel

# Approximate maximum of rows in the regression, from samples spread evenly over the training split.
MAX_ROWS = 65_536
# Rows after which no more are kept to fit the first layer's weights.
SOME_ROWS = 8_192
# Weight of the penalty, with every channel of the features scaled to a mean square of 1.
PENALTY = 0.1
# Strength relative to the random weights: of attention's preference for near context, and of its output.
NEARNESS, HANDED_ON = 3.0, 5.0


@torch.no_grad()
def ridge_initialise(
    model: BlockDraftModel, reader: CacheReader, samples: Sequence[int] | np.ndarray
) -> None:
    """Set a fresh draft's initial weights from a cache's training samples.

    Args:
        model: a draft that has the target's embedding and head, on any device; changed in place.
        reader: the cache.
        samples: numbers of the training samples.

    Raises:
        CacheError: the cache has no last hidden states.
    """
    reader.require_last_hidden("draft.init = ridge")
    layer_ids = tuple(model.config.target_layer_ids)
    device = model.fc.weight.device
    width, hidden = model.fc.in_features, model.fc.out_features
    gram = torch.zeros(width, width, device=device)
    products = torch.zeros(width, hidden, device=device)
    squares, count = torch.zeros((), device=device), 0
    kept: list[Tensor] = []
    tokens: list[Tensor] = []
    for features, states, ids in _rows(reader, samples, layer_ids):
        features, states = features.to(device).float(), states.to(device).float()
        gram.addmm_(features.T, features)
        products.addmm_(features.T, states)
        squares += states.square().sum()
        if count < SOME_ROWS:
            kept.append(features)
            tokens.append(ids.to(device))
        count += len(features)
    if not count:
        return
    model.fc.weight.copy_(_ridge(gram / count, products / count).T)
    context = model.hidden_norm(model.fc(torch.cat(kept)))
    _hand_on(model, context)
    _look_at_the_nearest(model, context, torch.cat(tokens))
    model.norm.weight.fill_((squares / (count * hidden)).sqrt().item())


def _rows(
    reader: CacheReader, samples: Sequence[int] | np.ndarray, layer_ids: tuple[int, ...]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield features `[n, L*H]`, with the target's states `[n, H]` and tokens `[n]` one position later."""
    samples = np.asarray(samples)
    rows = reader.candidates[samples]
    share = min(1.0, MAX_ROWS / max(1, rows.sum()))
    chosen = np.unique(
        np.linspace(0, len(samples) - 1, max(1, round(share * len(samples)))).round().astype(int)
    )
    for i in samples[chosen].tolist():
        sample = reader.read(i, layer_ids)
        later = sample.last_positions >= 2  # without the features of position 0, which are outliers
        places = sample.last_positions[later]
        yield sample.context[places - 1], sample.last_hidden[later], sample.input_ids[places].long()


def _ridge(gram: Tensor, products: Tensor) -> Tensor:
    """Return the ridge regression `[L*H, H]`, each channel penalised as if its rms were 1."""
    scale = gram.diagonal().sqrt().clamp(min=1e-6)
    gram = gram / scale / scale[:, None]
    gram.diagonal().add_(PENALTY)
    factor = torch.linalg.cholesky(gram)
    return torch.cholesky_solve(products / scale[:, None], factor) / scale[:, None]


def _hand_on(model: BlockDraftModel, context: Tensor) -> None:
    """Make the first layer's attention add the context that it attends to to the block.

    The values keep the main directions of the context, as many as they are wide.

    Args:
        context: normed context states `[n, H]`.
    """
    attention = model.layers[0].self_attn
    directions = torch.linalg.eigh(context.T @ context).eigenvectors.flip(1)  # largest eigenvalue first
    width = attention.v_proj.out_features
    main = torch.zeros_like(attention.v_proj.weight)
    main[: min(width, len(directions))] = directions.T[:width]
    attention.v_proj.weight.copy_(main)
    # Query heads of one group read the same values, so each passes on an equal share.
    groups = main.view(-1, attention.head_dim, main.shape[1])
    sharing = attention.q_proj.out_features // width
    output = groups.repeat_interleave(sharing, dim=0).flatten(0, 1).T / sharing
    attention.o_proj.weight.add_(HANDED_ON * output)


def _look_at_the_nearest(model: BlockDraftModel, context: Tensor, tokens: Tensor) -> None:
    """Make the first layer attend to the nearest context.

    Queries and context keys get a common part, in the dimensions of the fastest rotations only. Their
    product then falls with distance. Keys of the block's own slots get little of it.

    Args:
        context: normed context states `[n, H]`.
        tokens: ids of tokens that may be anchors, `[n]`.
    """
    layer = model.layers[0]
    attention, dim = layer.self_attn, layer.self_attn.head_dim
    common = torch.zeros(dim, device=context.device)
    fastest = min(dim // 2, max(4, dim // 8))  # one rotation alone is periodic: far would look near again
    common[:fastest] = fastest**-0.5
    mask = torch.tensor([model.config.mask_token_id], device=context.device)
    anchors, masks = (
        layer.input_layernorm(model.embed_tokens(ids) * model.embedding_scale).mean(dim=0)
        for ids in (tokens, mask)
    )
    # Readouts: of_context gives 1 for the mean context, of_block 1 for the mean anchor and the mask token.
    of_context = context.mean(dim=0) / context.mean(dim=0).square().sum()
    of_block = torch.linalg.pinv(torch.stack([anchors, masks], dim=1)).sum(dim=0)
    for projection, readout, states in (
        (attention.k_proj, of_context, context),
        (attention.q_proj, of_block, masks[None]),
    ):
        size = projection(states).unflatten(-1, (-1, dim)).norm(dim=-1).mean()
        heads = projection.out_features // dim
        projection.weight.add_(NEARNESS * size * torch.outer(common.repeat(heads), readout))
