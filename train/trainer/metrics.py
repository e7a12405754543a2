"""What a run did since its last log line: sums divided once, and how fast it was."""

from __future__ import annotations

import resource
import sys
from typing import Any

import torch
from torch import Tensor

from train.losses.slots import LossSums, Objective, divide

# Dense bf16 and TF32 FLOP/s by a part of the device's name, from NVIDIA's datasheets; the first match counts.
_PEAKS = {
    "GB200": (2.5e15, 1.25e15),
    "B200": (2.25e15, 1.125e15),
    "GH200": (9.9e14, 4.95e14),
    "H200": (9.89e14, 4.945e14),
    "H100 PCIe": (7.56e14, 3.78e14),
    "H100 NVL": (8.35e14, 4.18e14),
    "H100": (9.89e14, 4.945e14),
    "H20": (1.48e14, 7.4e13),
    "A100": (3.12e14, 1.56e14),
    "L40S": (3.62e14, 1.83e14),
    "L40": (1.81e14, 9.05e13),
    "L4": (1.21e14, 6.0e13),
    "RTX 5090": (2.09e14, 1.05e14),
    "RTX 4090": (1.65e14, 8.26e13),
    "RTX 3090": (7.1e13, 3.56e13),
}


def peak_flops(device: torch.device, precision: str, tf32: bool = True) -> float | None:
    """Return the device's dense FLOP/s in a precision, `bf16` or `fp32`; None where it is not known."""
    if device.type != "cuda" or (precision == "fp32" and not tf32):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peaks[precision == "fp32"] for part, peaks in _PEAKS.items() if part in name), None)


class Window:
    """Adds up optimiser steps between two log lines.

    Args:
        objective: what is minimised.
        device: where the draft is trained.
        peak: FLOP/s of all devices together in the run's precision, if known.
    """

    def __init__(self, objective: Objective, device: torch.device, peak: float | None):
        self._objective, self._device, self._peak = objective, device, peak
        self._begin()

    def _begin(self) -> None:
        self._sums: LossSums | None = None
        self._numbers = {"tokens": 0.0, "flops": 0.0, "waited": 0.0, "seconds": 0.0, "skipped": 0.0}
        self._norm: float | None = None

    @property
    def empty(self) -> bool:
        """Whether no step was taken since the last line."""
        return not self._numbers["seconds"]

    def add(self, sums: LossSums, norm: Tensor) -> None:
        """Count a step's losses, and the norm of its gradient before clipping."""
        self._sums = sums if self._sums is None else self._sums + sums
        self._norm = norm.item()

    def count(self, **numbers: float) -> None:
        """Count `tokens`, `flops`, `seconds`, those of them `waited` for data, and steps `skipped`."""
        for name, number in numbers.items():
            self._numbers[name] += number

    def line(self, step: int, epoch: int, lr: float) -> dict[str, Any]:
        """The log line, and a new beginning. Figures of no step at all are None."""
        terms = [f"{name}_loss" for name in self._objective.weights]
        names = ["loss", *terms, "accept_rate", "tau"]
        values: dict[str, Any] = {"step": step, **dict.fromkeys(names)}
        blocks = 0.0
        if self._sums is not None:
            found = divide(self._sums, self._objective).values()
            values |= {name: found[name].item() for name in names}
            blocks = self._sums.blocks.item()
        numbers = self._numbers
        seconds = max(numbers["seconds"], 1e-9)
        flops = numbers["flops"] / seconds
        values |= {
            "grad_norm": self._norm,
            "lr": lr,
            "epoch": epoch,
            "skipped_steps": int(numbers["skipped"]),
            "tokens_per_s": numbers["tokens"] / seconds,
            "blocks_per_s": blocks / seconds,
            "data_wait_percent": 100 * numbers["waited"] / seconds,
            "model_flops_per_s": flops,
            "peak_flops_percent": None if self._peak is None else 100 * flops / self._peak,
            "peak_memory_bytes": peak_memory(self._device),
        }
        self._begin()
        return values

    def state(self) -> dict[str, Any]:
        """What was added so far, for JSON, which keeps every bit of it."""
        sums = None if self._sums is None else [value.tolist() for value in self._sums.tensors()]
        return {"sums": sums, "norm": self._norm, **self._numbers}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a `state`. Raises ValueError when it is none."""
        if set(state) != {"sums", "norm", *self._numbers}:
            raise ValueError("the sums since the last log line are not what this version writes")
        sums = state["sums"]
        if sums is not None:
            tensors = [torch.tensor(value, device=self._device) for value in sums]
            self._sums = LossSums.from_tensors(list(self._objective.weights), tensors)
        self._norm = state["norm"]
        self._numbers = {name: state[name] for name in self._numbers}


def peak_memory(device: torch.device) -> int:
    """The most bytes that tensors on a GPU, or on a CPU this whole process, ever held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
