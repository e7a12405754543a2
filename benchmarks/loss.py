"""Compare the loss with its definition and NVIDIA's published loss: time and extra peak memory.

    python benchmarks/loss.py                  # the example's shape on the CPU, Qwen3-4B's on a GPU
    python benchmarks/loss.py --device cpu

"ours" is what training takes: the Triton kernel on an NVIDIA GPU, with the pass in torch's own operations
beside it as "chunked"; on a CPU that pass. Each implementation computes a loss and its gradients from block
states, Markov latents and teacher states, as in its own trainer, including the products with the vocabulary.
The head is frozen. All run in turn in each round of one process, so that noise of the machine affects them
equally. Read the ratios, which are medians over the rounds. Losses and gradients are checked to be the same
before any timing.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.record import record
from pipeline.device import resolve_device, reuse_freed_memory
from pipeline.features import at_least_fp32, head_logits
from train.draft.blocks.anchors import label_positions, sample_anchor_positions
from train.losses.fused import LowRankBias, SlotOperands, resolve_kernel, vocabulary_loss
from train.losses.slots import Objective, SlotFigures, Supervised, divide, slot_losses, sum_slots
from train.trainer.metrics import peak_flops

GAMMA, CE_ALPHA, L1_ALPHA = 4.0, 0.1, 0.9
OBJECTIVE = Objective({"ce": CE_ALPHA, "l1": L1_ALPHA}, GAMMA)
INSTALL = "pip install --no-deps nemo-automodel==0.7.0"


@dataclass(frozen=True)
class Case:
    """Shape and numeric settings of a comparison."""

    name: str
    blocks: int
    size: int
    hidden: int
    vocab: int
    rank: int
    dtype: torch.dtype = torch.float32
    """Dtype of the operands."""
    autocast: bool = False
    """Compute products in bf16, whatever the dtype."""
    reuse: bool = False
    """Let glibc keep freed memory, as this project's training on a CPU does."""
    tolerance: float = 1e-4
    """Largest difference of a gradient from the definition's, relative to its norm."""

    def __str__(self) -> str:
        shape = f"N={self.blocks} K={self.size} H={self.hidden} V={self.vocab} R={self.rank}"
        return f"{shape} {self.name}"


EXAMPLE, QWEN3_4B = (128, 7, 576, 49152, 64), (512, 7, 2560, 151936, 256)
# In bf16, signs of L1's gradient flip where draft and teacher are nearly equal, hence the tolerance.
CASES = {
    "cpu": [Case("fp32", *EXAMPLE), Case("fp32, freed memory kept", *EXAMPLE, reuse=True)],
    "cuda": [
        Case("bf16 autocast", *QWEN3_4B, autocast=True, tolerance=0.05),  # as this project trains
        Case("bf16 weights", *QWEN3_4B, dtype=torch.bfloat16, tolerance=0.05),  # as NVIDIA's recipe does
    ],
}
ROUNDS = {"cpu": 7, "cuda": 20}


@dataclass
class Inputs:
    """Inputs of all implementations: M = N*K slots, U positions that they share."""

    hidden: Tensor  # [M, H]
    latent: Tensor  # [U, R], the rows of W1
    head: Tensor  # [V, H]
    w2: Tensor  # [V, R]
    labels: Tensor  # [M]
    teacher: Tensor  # [U, H]
    which: Tensor  # [M], the position of each slot
    mask: Tensor  # [1, N, K], all of it supervised

    def trained(self) -> list[Tensor]:
        return [self.hidden, self.latent, self.w2]


def make_inputs(case: Case, device: torch.device) -> Inputs:
    """Make N anchors among twice as many candidates of a sequence. Their blocks overlap, as in training."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        # In place: a temporary would raise the peak that memory is measured from.
        return torch.randn(*shape, generator=generator).mul_(scale).to(device, case.dtype)

    length = 2 * case.blocks + 1
    supervised = torch.ones(1, length + case.size)
    anchors, _ = sample_anchor_positions(length, supervised, case.blocks, torch.device("cpu"), generator)
    labels, _ = label_positions(anchors, case.size, length + case.size)  # [1, N, K]
    tokens = torch.randint(case.vocab, (length + case.size,), generator=generator)
    used, which = torch.unique(labels.flatten() - 1, return_inverse=True)
    return Inputs(
        hidden=normal(len(which), case.hidden).requires_grad_(True),
        latent=normal(len(used), case.rank, scale=0.1).requires_grad_(True),
        head=normal(case.vocab, case.hidden, scale=1.2 * case.hidden**-0.5),
        w2=normal(case.vocab, case.rank, scale=0.1).requires_grad_(True),
        labels=tokens[labels.flatten()].to(device),
        teacher=normal(len(used), case.hidden),
        which=which.to(device),
        mask=torch.ones(labels.shape, dtype=torch.bool, device=device),
    )


def definition(x: Inputs) -> Tensor:
    """Compute the loss by `losses/slots.py`, on logits as in `Qwen3DSparkModel.forward`."""
    logits = head_logits(x.hidden, x.head) + at_least_fp32(F.linear(x.latent[x.which], x.w2))
    with torch.no_grad():
        teacher = head_logits(x.teacher[x.which], x.head)
    found = slot_losses(logits, x.labels, teacher)
    slots = SlotFigures(Supervised.of(x.mask), found.ce, found.l1, None)
    return divide(sum_slots(slots, OBJECTIVE), OBJECTIVE).loss


def ours(x: Inputs) -> Tensor:
    """Compute the loss by the kernel that `loss.kernel = "auto"` selects."""
    return fused(x, resolve_kernel("auto", x.hidden.device))


def chunked(x: Inputs) -> Tensor:
    """Compute the loss by `losses/plain.py`, compiled on a GPU."""
    return fused(x, "torch")


def fused(x: Inputs, kernel: str) -> Tensor:
    """Compute the loss by `losses/fused.py`, called as in `DSparkTrainerModule`."""
    weights = Supervised.of(x.mask).weights(GAMMA)
    operands = SlotOperands(
        hidden=x.hidden,
        head=x.head,
        labels=x.labels,
        positions=x.which,
        ce_weights=CE_ALPHA * weights,
        l1_weights=L1_ALPHA * weights,
        teacher_hidden=x.teacher,
        bias=LowRankBias(latent=x.latent, weight=x.w2, by_position=True),
    )
    found = vocabulary_loss(operands, kernel=kernel, compile_passes=x.hidden.is_cuda)
    slots = SlotFigures(Supervised.of(x.mask), found.ce, found.l1, None)
    return found.sum / sum_slots(slots, OBJECTIVE).weight


def load_nvidia() -> Callable[[Inputs], Tensor] | None:
    """Return NVIDIA's unchanged loss, on logits as its Qwen3 draft makes them; None if it is not installed.

    It has the terms of this project: L1 is not halved and the weights are the same. It divides by the sum of
    the weights plus 1e-6, which is lost in fp32 rounding. All implementations leave out the confidence term,
    which does not involve the vocabulary.
    """
    spec = importlib.util.find_spec("nemo_automodel")
    if spec is None or spec.origin is None:
        return None
    # NVIDIA's packages import models and a trainer's dependencies; these two files need only torch.
    package = ModuleType("nvidia_dspark")
    package.__path__ = [str(Path(spec.origin).parent / "components/speculative/dspark")]
    sys.modules[package.__name__] = package
    compute = importlib.import_module("nvidia_dspark.loss").compute_dspark_loss
    output = importlib.import_module("nvidia_dspark.common").DSparkForwardOutput

    def run(x: Inputs) -> Tensor:
        blocks = (*x.mask.shape, -1)
        outputs = output(
            aligned_target_logits=F.linear(x.teacher[x.which].view(blocks), x.head),
            draft_logits=F.linear(x.hidden, x.head).view(blocks)
            + F.linear(x.latent[x.which].view(blocks), x.w2),
            target_ids=x.labels.view(x.mask.shape),
            eval_mask=x.mask,
            block_keep_mask=x.mask[..., 0],
        )
        return compute(
            outputs=outputs,
            loss_decay_gamma=GAMMA,
            ce_loss_alpha=CE_ALPHA,
            l1_loss_alpha=L1_ALPHA,
            confidence_head_alpha=0.0,
            return_terms=True,
        )[0]

    return run


def load_ways(device: str = "cuda") -> dict[str, Callable[[Inputs], Tensor]]:
    """Return the implementations that a kind of device has, by name."""
    kernel = device == "cuda" and torch.cuda.is_available() and resolve_kernel("auto", torch.device("cuda"))
    ways = {"ours": ours, "chunked": chunked if kernel == "triton" else None}
    ways |= {"definition": definition, "NVIDIA": load_nvidia()}
    return {name: way for name, way in ways.items() if way is not None}


def step(way: Callable[[Inputs], Tensor], x: Inputs, case: Case) -> float:
    """Compute a loss and its gradients, which replace the previous ones. Return the loss."""
    for tensor in x.trained():
        tensor.grad = None
    with torch.autocast(x.hidden.device.type, dtype=torch.bfloat16, enabled=case.autocast):
        loss = way(x)
    loss.backward()
    return loss.item()  # waits for a GPU's forward


def check(ways: dict[str, Callable[[Inputs], Tensor]], x: Inputs, case: Case) -> None:
    """Check that every implementation gives the definition's loss and gradients."""
    expected = step(definition, x, case)
    gradients = [tensor.grad for tensor in x.trained()]
    for name, way in ways.items():
        loss = step(way, x, case)
        errors = [
            ((tensor.grad.float() - gradient.float()).norm() / gradient.float().norm()).item()
            for tensor, gradient in zip(x.trained(), gradients, strict=True)
        ]
        print(f"{name}: loss {loss:.6f}, gradients off by {', '.join(f'{error:.1e}' for error in errors)}")
        assert abs(loss / expected - 1) < case.tolerance / 10, (name, loss, expected)
        assert max(errors) < case.tolerance, (name, errors)


def measure_seconds(
    ways: dict[str, Callable[[Inputs], Tensor]], x: Inputs, case: Case, rounds: int
) -> dict[str, list[float]]:
    """Return the seconds of each implementation in every round after a warm-up round."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            step(way, x, case)
            if x.hidden.is_cuda:
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    return {name: values[1:] for name, values in times.items()}


def _resident(field: str) -> int:
    """Return resident bytes: VmRSS now, VmHWM at peak (getrusage would start from the parent's peak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _extra_resident(name: str, case: Case, queue: multiprocessing.Queue) -> None:
    if case.reuse:
        reuse_freed_memory()
    way, device = load_ways("cpu")[name], torch.device("cpu")
    step(way, make_inputs(Case("tiny", 8, 2, 64, 128, 8), device), case)  # libraries allocate on first use
    x = make_inputs(case, device)
    before = _resident("VmRSS")
    step(way, x, case)
    queue.put(_resident("VmHWM") - before)


def extra_memory(name: str, way: Callable[[Inputs], Tensor], x: Inputs, case: Case) -> int:
    """Return the peak memory of a step in addition to its inputs; on a CPU in a separate process."""
    for tensor in x.trained():
        tensor.grad = None
    if x.hidden.is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(way, x, case)
        return torch.cuda.max_memory_allocated() - before
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_extra_resident, args=(name, case, queue))
    process.start()
    extra = queue.get(timeout=600)  # a timeout means that the process died
    process.join()
    return extra


def measure(
    case: Case, ways: dict[str, Callable[[Inputs], Tensor]], device: torch.device, rounds: int
) -> list[tuple[str, str, float, str]]:
    """Return a case's rows, measured in so many rounds."""
    if case.reuse:
        reuse_freed_memory()  # affects the rest of this process, so such cases come last
    x = make_inputs(case, device)
    print(f"{case}: {len(x.hidden)} slots share {len(x.teacher)} positions")
    check(ways, x, case)
    times = measure_seconds(ways, x, case, rounds)
    memory = {name: extra_memory(name, way, x, case) for name, way in ways.items()}
    rows = [(f"{case} {name}", "time", statistics.median(times[name]), "s") for name in ways]
    rows += [(f"{case} {name}", "extra peak memory", memory[name] / 2**20, "MiB") for name in ways]
    for other in [name for name in ways if name != "ours"]:
        ratio = statistics.median(a / b for a, b in zip(times["ours"], times[other], strict=True))
        rows.append((f"{case}", "time ratio", ratio, f"ours/{other}"))
        rows.append((f"{case}", "memory ratio", memory["ours"] / memory[other], f"ours/{other}"))
    peak = peak_flops(device, "bf16") if device.type == "cuda" else None
    if peak is not None:
        shares = {name: 100 * operations(x) / statistics.median(times[name]) / peak for name in ways}
        rows += [(f"{case} {name}", "share of the peak", share, "%") for name, share in shares.items()]
    return rows


def operations(x: Inputs) -> int:
    """Return the operations of the products that the loss needs, as `training_flops` counts them."""
    (slots, hidden), (positions, rank), vocab = x.hidden.shape, x.latent.shape, len(x.head)
    return vocab * (4 * slots * hidden + 2 * positions * hidden + 6 * positions * rank)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    device = resolve_device(parser.parse_args().device)
    ways = load_ways(device.type)
    if "NVIDIA" not in ways:
        print(f"NVIDIA's loss is not installed and is left out; to compare with it run: {INSTALL}")
    rows = []
    for case in CASES[device.type]:
        rows += measure(case, ways, device, ROUNDS[device.type])
    record("loss", device, rows)


if __name__ == "__main__":
    main()
