"""Hardware-aware prefix schedulers: choose the number of drafted tokens to verify per request.

They are for engines that verify many requests at once: the DSpark paper's Algorithm 1, and the search that
TensorRT-LLM 1.4 does instead. `dspark schedule` simulates both. `dspark speculate` has one request and uses a
threshold.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from itertools import accumulate
from operator import mul


def schedule(confidences: Sequence[Sequence[float]], steps_per_second: Callable[[int], float]) -> list[int]:
    """Return the number of drafted tokens to verify per request, for the highest expected throughput.

    Tokens are admitted one by one over all requests. The next is the token with the largest product of its
    request's confidences up to it: the probability that it is reached and accepted. Admission continues while
    each token raises the expected throughput

        (requests + sum of admitted products) * steps_per_second(requests + admitted)

    It ends at the first token that does not, even if further ones together would. A token's admission must
    not depend on confidences after it, because they depend on the token itself: the output would no longer
    have the target's distribution (the paper's appendix A, which `tests/train/test_schedule.py` works out).

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


def schedule_globally(
    confidences: Sequence[Sequence[float]],
    steps_per_second: Callable[[int], float],
    *,
    least: int = 1,
    least_gain: float = 0.0,
) -> list[int]:
    """Return the lengths of the highest expected throughput of all, as TensorRT-LLM 1.4 chooses them.

    Tokens are admitted in the order of `schedule`, but none ends the search: where the speed falls in stairs,
    the best number of tokens may lie beyond a step down. That is lossless only if the confidences do not
    depend on the tokens that are decided about, so pass those of an earlier step.

    Args:
        confidences: as in `schedule`.
        steps_per_second: as in `schedule`.
        least: drafted tokens that each request verifies in any case, as far as it has so many.
        least_gain: verify everything unless the best promises more than this share above that.

    Returns:
        One number per request, from `least` to the number of its drafted tokens.
    """
    if not confidences:
        return []
    lengths = [min(least, len(own)) for own in confidences]
    batch, expected = len(confidences) + sum(lengths), float(len(confidences))
    waiting = []
    for request, own in enumerate(confidences):
        products = list(accumulate(own, mul))
        expected += sum(products[: lengths[request]])
        waiting += [(-products[k], k, request) for k in range(lengths[request], len(own))]
    waiting.sort()  # a request's products never rise, so its positions stay in order
    totals = list(accumulate((-product for product, _, _ in waiting), initial=expected))
    found = [total * steps_per_second(batch + n) for n, total in enumerate(totals)]
    chosen = max(range(len(found)), key=found.__getitem__)  # the fewest of equals
    if found[chosen] < found[-1] * (1 + least_gain):
        chosen = len(waiting)
    for _, position, request in waiting[:chosen]:
        lengths[request] = position + 1
    return lengths
