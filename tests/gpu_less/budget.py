"""Waits for a GPU that the host may do: on the pretend device of tests, and on a real one by `make gpu`."""

from __future__ import annotations

BUDGET = {
    # The states of a batch are encoded and copied without a look at them.
    "forward of capture": 0,
    # The loop stays two batches ahead of the GPU: it waits for the batch before those.
    "batch of capture": 1,
    # The thread that writes a shard waits for the shard's copies.
    "shard of capture": 1,
    # The loader's threads count the supervised slots, so that the GPU need not be asked.
    "micro-batch": 0,
    # The loss and the gradient's norm are finite or not: that decides whether the step is taken.
    "optimiser step": 1,
    # All figures of a line in one copy.
    "log line": 1,
    # Sums stay on the GPU until the evaluation ends.
    "micro-batch of validation": 0,
    # All figures of an evaluation in one copy.
    "validation": 1,
    # `dspark evaluate` looks at each block: the figures of all slots, and the anchors.
    "forward of evaluation": 2,
    # How many tokens the target accepts, and which they are.
    "round of decoding": 2,
    # The token decides whether the text ends.
    "token of plain decoding": 1,
}
