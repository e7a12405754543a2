"""Initial weights of a block drafter from the cache, by linear regression.

Much of the target's next state is a linear map of two things that a draft can see: the features of the last
context position, and the token before the one to be drafted. A draft with random weights spends most of a
short run on finding that out. So `draft.init = "ridge"` regresses the target's post-norm states on both, and
makes a fresh draft compute about that prediction:

- a Markov head, which sees the token, gets the token's part; without one the features are all there is;
- `fc`, and the first layer's values and output, get the features' part. The rows of mask tokens draft from
  further away than the anchor's row, so their part is a regression of its own, and heads of their own;
- the first layer attends to the nearest context;
- the final norm gets the prediction's scale.

Training then changes all of these. benchmarks/acceptance.py measures the gain.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pipeline.cache import CacheReader
from train.draft.blocks.model import BlockDraftModel
from train.draft.blocks.regression import ALL, ANCHOR, CHUNK, MASK, Rows, collect, regress, regular_root

# Weight of a token that does not occur, where one that does has its number of occurrences.
UNSEEN = 0.1
# Rms of what the first layer hands on, in multiples of its input's. That input, the anchor's embedding, would
# otherwise predict the anchor itself.
HANDED_ON = 60.0
# The same in multiples of what random weights add after it: more, the wider and deeper the draft is.
OVER_RANDOM = 10.0
# Weight of the norms of queries and keys, which decides how sharp attention is.
SHARPNESS = 3.0
# Weight of the first layer's input norm: its values then hold little of the block's own rows.
OWN_ROWS = 0.15
# Rms of the weights of `fc`. The norm after it undoes it; the larger, the less a step of Adam changes them.
PROJECTION = 0.1
# Share of the random weights that stays beside the regressed ones.
RANDOM = 0.2


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
    distances = row_distances(model)
    layer_ids = tuple(model.config.target_layer_ids)
    found = collect(reader, samples, layer_ids, model.embed_tokens, distances)
    if found is None:
        return
    moments, rows = found
    of_tokens, of_features = regress(moments, distances, model.sees_tokens)
    root = logit_root(model, moments.counts)
    model.begin_bias(of_tokens, moments.token_mean, moments.tokens, root)
    from_context = _project(model, rows, of_features, root)
    context = model.hidden_norm(model.fc(rows.nearest))
    left = rows.states - rows.embedded @ of_tokens
    embedding = (model.embed_tokens(rows.tokens) * model.embedding_scale).square().mean().sqrt()
    size = torch.maximum(HANDED_ON * embedding, OVER_RANDOM * _added_later(model, context))
    scale = _hand_on(model, context, left, from_context, size)
    _look_at_the_nearest(model, context, rows.tokens, distances)
    model.norm.weight.fill_(scale)


def logit_root(model: BlockDraftModel, counts: Tensor) -> Tensor:
    """Return a root of the head's covariance, `[H, H]`: |x @ root| is how much a state x changes the logits.

    Tokens count by how often they occur, and a little if they don't.

    Args:
        counts: of the target's tokens `[V]`.
    """
    weights = counts[model.kept] if model.reduced else counts
    weights = (weights + UNSEEN) / (weights + UNSEEN).sum()
    chunks = list(zip(model.lm_head.weight.split(CHUNK), weights.split(CHUNK), strict=True))
    mean = sum(share @ rows.float() for rows, share in chunks)
    covariance = torch.zeros(len(mean), len(mean), device=mean.device)
    for rows, share in chunks:
        centred = rows.float() - mean
        covariance.addmm_((centred * share[:, None]).T, centred)
    return regular_root(covariance)


def row_distances(model: BlockDraftModel) -> dict[str, range]:
    """Return the distances d of the rows that draft, as `Moments` counts them, by class.

    All are one class where no anchor's row drafts, or no two query heads share their values.
    """
    attention = model.layers[0].self_attn
    if model.first_slot or model.slots == 1 or attention.q_proj.out_features == attention.v_proj.out_features:
        return {ALL: range(model.slots)}
    return {ANCHOR: range(1), MASK: range(1, model.slots)}


def _project(
    model: BlockDraftModel, rows: Rows, of_features: dict[str, Tensor], root: Tensor
) -> dict[str, Tensor]:
    """Set `fc` to the main directions of all classes' predictions, the largest first.

    Args:
        root: from `logit_root`; directions are large by what they do to the logits.

    Returns:
        Each class's map from `fc`'s outputs back to its prediction `[H, H]`, up to a factor.
    """
    maps = torch.cat([each @ root for each in of_features.values()], dim=1)  # [W, classes * H]
    predicted = rows.nearest @ maps
    directions = torch.linalg.eigh(predicted.T @ predicted).eigenvectors.flip(1)[:, : model.fc.out_features]
    weight = maps @ directions
    model.fc.weight.copy_(PROJECTION * (weight / weight.square().mean().sqrt()).T)
    parts = directions.split(len(root))  # [H, H] of each class
    back = [torch.linalg.solve_triangular(root.T, part, upper=True).T for part in parts]
    return dict(zip(of_features, back, strict=True))


def _hand_on(
    model: BlockDraftModel,
    context: Tensor,
    states: Tensor,
    from_context: dict[str, Tensor],
    size: Tensor,
) -> float:
    """Make the first layer's attention add each class's prediction to the rows that attend by its heads.

    The values are the context's first directions, as many as they are wide.

    Args:
        context: normed context states `[n, H]`.
        states: what is to be predicted from them, by rows of the first class, `[n, H]`.
        from_context: from `_project`.
        size: rms of what is added.

    Returns:
        The rms of the first class's prediction.
    """
    attention = model.layers[0].self_attn
    width, dim = attention.v_proj.out_features, attention.head_dim
    heads = heads_of(model, list(from_context))
    used = min(width, context.shape[1])
    main = torch.zeros_like(attention.v_proj.weight)
    main[:used, :used] = torch.eye(used, device=main.device)
    attention.v_proj.weight.copy_(main)
    attention.o_proj.weight.mul_(RANDOM)
    output = attention.o_proj.weight.unflatten(1, (-1, dim))  # [H, heads, D]
    scales = []
    for name, back in from_context.items():
        predicted = context[:, :used] @ back[:used]
        rms = predicted.square().mean().sqrt()
        scales.append((predicted * states).mean() / rms)  # least squares
        padded = torch.zeros(width, len(output), device=back.device)
        padded[:used] = size / rms * back[:used]
        for group, part in enumerate(padded.unflatten(0, (-1, dim))):  # [D, H] of each key-value head
            for head in heads[name][group]:
                output[:, head] += part.T / len(heads[name][group])
    return scales[0].item()


def heads_of(model: BlockDraftModel, classes: list[str]) -> dict[str, list[list[int]]]:
    """Return each class's query heads, by the key-value head that they read."""
    attention = model.layers[0].self_attn
    groups = attention.v_proj.out_features // attention.head_dim
    sharing = attention.q_proj.out_features // attention.head_dim // groups
    each = [list(range(group * sharing, (group + 1) * sharing)) for group in range(groups)]
    if classes == [ALL]:
        return {ALL: each}
    first = max(1, sharing // 3)
    return {ANCHOR: [heads[:first] for heads in each], MASK: [heads[first:] for heads in each]}


def _added_later(model: BlockDraftModel, rows: Tensor) -> Tensor:
    """Return about the rms that random weights add to a row after the first layer's attention.

    Args:
        rows: any rows `[n, H]`; layers norm them.
    """
    added = rows.new_zeros(())
    for number, layer in enumerate(model.layers):
        attention = layer.self_attn
        added += layer.mlp(layer.post_attention_layernorm(rows)).square().mean()
        if number:  # at most, if a row attends to one other
            values = attention.v_proj(layer.input_layernorm(rows)).unflatten(-1, (-1, attention.head_dim))
            groups = attention.o_proj.in_features // attention.v_proj.out_features
            added += attention.o_proj(values.repeat_interleave(groups, dim=-2).flatten(-2)).square().mean()
    return added.sqrt()


def _look_at_the_nearest(
    model: BlockDraftModel, context: Tensor, tokens: Tensor, distances: dict[str, range]
) -> None:
    """Make the first layer's heads attend to the nearest context in the rows of their class.

    Context keys get a common part in the dimensions of the fastest rotations, and queries the same part,
    turned so that their product is largest at the distance of the class's first row and falls from there. In
    rows of the other class it is negative, and so it is for keys of the block's own rows: a head that is not
    asked attends to these.

    Args:
        context: normed context states `[n, H]`.
        tokens: ids of tokens that may be anchors, `[n]`.
    """
    layer = model.layers[0]
    attention, dim = layer.self_attn, layer.self_attn.head_dim
    layer.input_layernorm.weight.fill_(OWN_ROWS)
    for norm in (attention.q_norm, attention.k_norm):
        norm.weight.fill_(SHARPNESS)
    common = torch.zeros(dim, device=context.device)
    fastest = min(dim // 2, max(4, dim // 8))  # one rotation alone is periodic: far would look near again
    common[:fastest] = fastest**-0.5
    mask = torch.tensor([model.config.mask_token_id], device=context.device)
    anchors, masks = (
        layer.input_layernorm(model.embed_tokens(ids) * model.embedding_scale) for ids in (tokens, mask)
    )
    readout = {
        "key": _separate([(context, 1.0), (anchors, -1.0), (masks, -1.0)]),
        ANCHOR: _separate([(anchors, 1.0), (masks, -1.0)]),
        MASK: _separate([(anchors, -1.0), (masks, 1.0)]),
        ALL: _separate([(anchors, 1.0), (masks, 1.0)]),
    }
    sizes = []
    for projection, states in ((attention.k_proj, context), (attention.q_proj, anchors)):
        sizes.append(projection(states).unflatten(-1, (-1, dim)).norm(dim=-1).mean())
        projection.weight.mul_(RANDOM)
    keys = attention.k_proj.out_features // dim
    attention.k_proj.weight.add_(sizes[0] * torch.outer(common.repeat(keys), readout["key"]))
    queries = attention.q_proj.weight.unflatten(0, (-1, dim))
    for name, groups in heads_of(model, list(distances)).items():
        nearest = 1 + model.first_slot + distances[name].start
        angles = model.rotary_emb.inv_freq.to(common) * nearest
        turned = torch.cat([common[: dim // 2] * angles.cos(), -common[: dim // 2] * angles.sin()])
        for head in itertools.chain(*groups):
            queries[head] += sizes[1] * torch.outer(turned, readout[name])


def _separate(classes: list[tuple[Tensor, float]]) -> Tensor:
    """Return the ridge regression `[H]` of a number on rows of several classes `[n, H]`, weighed alike."""
    gram = sum(rows.T @ rows / len(rows) for rows, _ in classes)
    wanted = sum(value * rows.mean(0) for rows, value in classes)
    assert isinstance(gram, Tensor)
    gram.diagonal().add_(1e-3 * gram.diagonal().mean())
    return torch.linalg.solve(gram, wanted)
