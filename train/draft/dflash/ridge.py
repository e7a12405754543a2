"""Initial weights of a DFlash draft from the cache, by linear regression on the target's features alone.

`fc` gets the ridge regression of the target's post-norm state on its features at the position before,
and the first layer prefers near context and adds it to the block. A DFlash draft sees the anchor's token by
attention only, and learned better from these weights than from those of `train.draft.blocks.ridge`
(docs/log.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.cache import CacheReader
from train.draft.blocks.model import BlockDraftModel
from train.draft.blocks.regression import ALL, collect, regress

# Weight of the penalty, as in `regress`.
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
    layer_ids, distances = tuple(model.config.target_layer_ids), {ALL: range(1)}
    found = collect(reader, samples, layer_ids, model.embed_tokens, distances)
    if found is None:
        return
    moments, rows = found
    _, of_features = regress(moments, distances, sees_tokens=False, penalty=PENALTY)
    model.fc.weight.copy_(of_features[ALL].T)
    context = model.hidden_norm(model.fc(rows.nearest))
    _hand_on(model, context)
    _look_at_the_nearest(model, context, rows.tokens)
    model.norm.weight.fill_(rows.states.square().mean().sqrt().item())


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
