"""Hardware-aware prefix scheduler: choose the number of drafted tokens to verify per request.

DSpark paper, Algorithm 1. It is for engines that verify many requests at once. `dspark speculate` has one
request and uses a threshold instead.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence


def schedule(confidences: Sequence[Sequence[float]], steps_per_second: Callable[[int], float]) -> list[int]:
    """Return the number of drafted tokens to verify per request, for the highest expected throughput.

    Tokens are admitted one by one over all requests. The next is the token with the largest product of its
    request's confidences up to it: the probability that it is reached and accepted. Admission continues while
    each token raises the expected throughput

        (requests + sum of admitted products) * steps_per_second(requests + admitted)

    It ends at the first token that does not, even if further ones together would. A token's admission must
    not depend on confidences after it, because they depend on the token itself: the output would no longer
    have the target's distribution (the paper's appendix A; `tests/train/test_schedule.py` has such a case).

    Args:
        confidences: per request, the probability that each drafted token is accepted if all before it are.
        steps_per_second: engine steps per second, as a function of the tokens in a batch.

    Returns:
        One number per request, from 0 to the number of its drafted tokens.
    """
    lengths = [0] * len(confidences)
    waiting = [(-own[0], 0, request) for request, own in enumerate(confidences) if own]
    heapq.heapify(waiting)  # most probable first; on a tie the earlier position, then the earlier request
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
