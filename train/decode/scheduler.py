"""How much of each request's block is worth verifying, when a server verifies many at once.

DSpark paper, Algorithm 1, the hardware-aware prefix scheduler. It is for engines; `dspark speculate`, which
has one request, uses a threshold.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence


def schedule(confidences: Sequence[Sequence[float]], steps_per_second: Callable[[int], float]) -> list[int]:
    """How many drafted tokens of each request to verify, so that most tokens come out a second.

    Tokens are admitted one by one, over all requests the one first that is most likely reached and accepted
    (the product of its request's confidences up to it), for as long as each raises the expected throughput

        (requests + sum of admitted products) * steps_per_second(requests + admitted)

    The first that does not ends it, though later ones together might: a token's admission must not depend
    on confidences behind it, which depend on the token itself. With them the output would not have the
    target's distribution any more (the paper's appendix A; `tests/train/test_schedule.py` has such a case).

    Args:
        confidences: of each request, how likely each drafted token is accepted if those before it are.
        steps_per_second: steps a second of the engine with so many tokens in a batch.

    Returns:
        One number a request, from 0 to its drafted tokens.
    """
    lengths = [0] * len(confidences)
    waiting = [(-own[0], 0, request) for request, own in enumerate(confidences) if own]
    heapq.heapify(waiting)  # the likeliest first; of equals the earlier position, then the earlier request
    batch, expected = len(confidences), float(len(confidences))
    best = expected * steps_per_second(batch) if batch else 0.0
    while waiting:
        product, position, request = heapq.heappop(waiting)
        batch, expected = batch + 1, expected - product
        throughput = expected * steps_per_second(batch)
        if throughput <= best:
            break
        best = throughput
        lengths[request] = position + 1
        following = position + 1
        if following < len(confidences[request]):
            heapq.heappush(waiting, (product * confidences[request][following], following, request))
    return lengths
