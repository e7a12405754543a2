"""The chunked loss against its definition, projections included: time and extra peak memory.

    python benchmarks/loss.py            # the example's vocabulary, on the CPU

Both run in one process a measurement, in turn, so that a noisy machine hits them alike; read the ratios.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.record import record
from pipeline.features import head_logits
from train.fused_loss import vocabulary_loss
from train.losses import slot_losses, slot_weights

SLOTS, BLOCK, HIDDEN, RANK, VOCAB, ROUNDS = 896, 7, 576, 64, 49152, 5


def inputs() -> dict[str, torch.Tensor]:
    """N=128 blocks of K=7 at the example's H and V; each teacher position serves several slots."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    return {
        "hidden": normal(SLOTS, HIDDEN).requires_grad_(True),
        "latent": normal(SLOTS, RANK, scale=0.1).requires_grad_(True),
        "head": normal(VOCAB, HIDDEN, scale=0.05),
        "w2": normal(VOCAB, RANK, scale=0.1).requires_grad_(True),
        "labels": torch.randint(VOCAB, (SLOTS,), generator=generator),
        "teacher": normal(SLOTS // 3, HIDDEN),
        "which": torch.randint(SLOTS // 3, (SLOTS,), generator=generator),
        "weights": slot_weights(BLOCK, 4.0).repeat(SLOTS // BLOCK),
    }


def definition(x: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = head_logits(x["hidden"], x["head"]) + x["latent"] @ x["w2"].T
    teacher = head_logits(x["teacher"], x["head"])[x["which"]]
    ce, l1 = slot_losses(logits, x["labels"], teacher)
    return (x["weights"] * (0.1 * ce + 0.9 * l1)).sum()


def chunked(x: dict[str, torch.Tensor]) -> torch.Tensor:
    weights = x["weights"]
    operands = (x["hidden"], x["latent"], x["head"], x["w2"], x["labels"], x["teacher"], x["which"])
    return vocabulary_loss(*operands, 0.1 * weights, 0.9 * weights)[0]


WAYS = {"definition": definition, "chunked": chunked}


def _peak(way: str, queue: multiprocessing.Queue) -> None:
    x = inputs()
    before = _high_water()
    WAYS[way](x).backward()
    queue.put(_high_water() - before)


def _high_water() -> int:
    """Peak resident bytes of this process (getrusage would start from the parent's peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def peak_bytes(way: str) -> int:
    """Extra peak memory of one forward and backward, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_peak, args=(way, queue))
    process.start()
    extra = queue.get()
    process.join()
    return extra


def main() -> None:
    x = inputs()
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(ROUNDS + 1):  # the first warms up
        for way, run in WAYS.items():
            start = time.perf_counter()
            run(x).backward()
            times[way].append(time.perf_counter() - start)
    seconds = {way: statistics.median(values[1:]) for way, values in times.items()}
    memory = {way: peak_bytes(way) for way in WAYS}
    case = f"N={SLOTS // BLOCK} K={BLOCK} H={HIDDEN} V={VOCAB} R={RANK} fp32"
    rows = [(f"{case} {way}", "time", seconds[way], "s") for way in WAYS]
    rows += [(f"{case} {way}", "extra peak memory", memory[way] / 2**20, "MiB") for way in WAYS]
    rows.append((case, "time ratio", seconds["chunked"] / seconds["definition"], "chunked/definition"))
    rows.append((case, "memory ratio", memory["chunked"] / memory["definition"], "chunked/definition"))
    record("loss", torch.device("cpu"), rows)


if __name__ == "__main__":
    main()
