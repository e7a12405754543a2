"""Which drafted tokens the target accepts, and the one after: its own distribution, whatever was drafted.

Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding", section 2.3; Chen et
al. 2023. V vocabulary, n drafted tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def choose(logits: Tensor, temperature: float, generator: torch.Generator | None = None) -> Tensor:
    """A token from logits `[V]`: the most likely one at temperature 0, else sampled."""
    if temperature == 0:
        return logits.argmax()
    return torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator)[0]


def accept(
    drafted: Tensor,
    draft_probs: Tensor | None,
    target_logits: Tensor,
    temperature: float,
    generator: torch.Generator | None = None,
) -> tuple[int, Tensor]:
    """Verify a block.

    Token i is accepted with probability min(1, q(x_i) / p(x_i)), p the draft's distribution and q the
    target's. The first one rejected is replaced by a sample of max(q - p, 0), normalised; if all are
    accepted, the target's next token is added. At temperature 0 a token is accepted if it is the target's.

    Args:
        drafted: `[n]`.
        draft_probs: what they were sampled from, `[n, V]`; None at temperature 0.
        target_logits: the target's, before each of them and behind the last, `[n + 1, V]`.
        temperature: of both.
        generator: on their device.

    Returns:
        How many are accepted, and the token after those.
    """
    n = len(drafted)
    if temperature == 0:
        own = target_logits.argmax(-1)
        count = int((drafted == own[:n]).cumprod(0).sum())
        return count, own[count]
    target_probs = torch.softmax(target_logits / temperature, -1)
    if n == 0:
        return 0, torch.multinomial(target_probs[0], 1, generator=generator)[0]
    assert draft_probs is not None
    rows = torch.arange(n, device=drafted.device)
    chance = target_probs[rows, drafted] / draft_probs[rows, drafted]
    drawn = torch.rand(n, generator=generator, device=drafted.device, dtype=chance.dtype)
    count = int((drawn < chance).cumprod(0).sum())
    left = target_probs[count]
    if count < n:
        rest = (left - draft_probs[count]).clamp(min=0)
        left = rest if rest.sum() > 0 else left  # equal to the last digit
    return count, torch.multinomial(left, 1, generator=generator)[0]
