"""Accept or reject drafted tokens so that the output has the target's own distribution.

Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding", section 2.3; Chen et
al. 2023. V vocabulary, n drafted tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from train.runtime.sampling import draw


def choose(logits: Tensor, temperature: float, generator: torch.Generator | None = None) -> Tensor:
    """Return a token from logits `[V]`: the most likely one at temperature 0, else a sample."""
    if temperature == 0:
        return logits.argmax()
    return draw(torch.softmax(logits / temperature, -1), generator)


def accept(
    drafted: Tensor,
    draft_probs: Tensor | None,
    target_logits: Tensor,
    temperature: float,
    generator: torch.Generator | None = None,
) -> tuple[int, Tensor]:
    """Return the number of accepted tokens of a block, and the token after them.

    Token i is accepted with probability min(1, q(x_i) / p(x_i)), p the draft's distribution and q the
    target's. The first rejected token is replaced by a sample of max(q - p, 0), normalised. If all are
    accepted, the target's next token is added. At temperature 0 a token is accepted if it is the target's.

    Args:
        drafted: drafted tokens, `[n]`.
        draft_probs: distributions that they were sampled from, `[n, V]`; None at temperature 0.
        target_logits: the target's logits for each drafted token and for the token after the last,
            `[n + 1, V]`.
        temperature: sampling temperature of draft and target.
        generator: random generator on the device of the tensors.

    Returns:
        The number of accepted tokens, and the token after them.
    """
    n = len(drafted)
    if temperature == 0:
        own = target_logits.argmax(-1)
        count = int((drafted == own[:n]).cumprod(0).sum())
        return count, own[count]
    target_probs = torch.softmax(target_logits / temperature, -1)
    if n == 0:
        return 0, draw(target_probs[0], generator)
    assert draft_probs is not None
    rows = torch.arange(n, device=drafted.device)
    chance = target_probs[rows, drafted] / draft_probs[rows, drafted]
    drawn = torch.rand(n, generator=generator, device=drafted.device, dtype=chance.dtype)
    count = int((drawn < chance).cumprod(0).sum())
    left = target_probs[count]
    if count < n:
        rest = (left - draft_probs[count]).clamp(min=0)
        left = torch.where(rest.sum() > 0, rest, left)  # the sum is 0 if both are equal up to rounding
    return count, draw(left, generator)
