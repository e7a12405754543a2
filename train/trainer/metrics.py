"""Figures of a log line: losses, divided once, and speed since the last line."""

from __future__ import annotations

import resource
import sys
from typing import Any

import torch
from torch import Tensor

from train.eval.validate import teacherless
from train.losses.slots import LossSums, Objective, divide, to_numbers

# Dense bf16 and TF32 FLOP/s by part of the device's name, from NVIDIA's datasheets. The first match is used.
_PEAKS = {
    "GB200": (2.5e15, 1.25e15),
    "B200": (2.25e15, 1.125e15),
    "GH200": (9.9e14, 4.95e14),
    "H200 NVL": (8.35e14, 4.18e14),
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
    """Return the device's dense FLOP/s in a precision, `bf16` or `fp32`; None if it is not known."""
    if device.type != "cuda" or (precision == "fp32" and not tf32):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peaks[precision == "fp32"] for part, peaks in _PEAKS.items() if part in name), None)


class Window:
    """Sums of the optimiser steps since the last log line.

    Args:
        objective: the loss terms and their weights.
        device: device that this rank trains on.
        peak: FLOP/s of all devices together in the run's precision, if known.
        teacher: the cache has last hidden states. Figures that need them are None otherwise.
    """

    def __init__(
        self, objective: Objective, device: torch.device, peak: float | None, *, teacher: bool = True
    ):
        self._objective, self._device, self._peak, self._teacher = objective, device, peak, teacher
        self._begin()

    def _begin(self) -> None:
        self._sums: LossSums | None = None
        self._numbers = {"tokens": 0.0, "flops": 0.0, "waited": 0.0, "seconds": 0.0, "skipped": 0.0}
        self._norm: Tensor | None = None

    @property
    def empty(self) -> bool:
        """True if no step was taken since the last line."""
        return not self._numbers["seconds"]

    def add(self, sums: LossSums, norm: Tensor) -> None:
        """Add a step's losses, and keep the norm of its gradient before clipping."""
        self._sums = sums if self._sums is None else self._sums + sums
        self._norm = norm

    def count(self, **numbers: float) -> None:
        """Add to `tokens`, `flops`, `seconds`, seconds `waited` for data, and `skipped` steps."""
        for name, number in numbers.items():
            self._numbers[name] += number

    def line(self, step: int, epoch: int, lr: float) -> dict[str, Any]:
        """Return the log line, and reset the sums. Losses and the norm are None if all steps were skipped."""
        terms = [f"{name}_loss" for name in self._objective.weights]
        names = ["loss", *terms, "accept_rate", "tau"]
        values: dict[str, Any] = {"step": step, **dict.fromkeys([*names, "grad_norm"])}
        blocks = 0.0
        if self._sums is not None and self._norm is not None:
            figures = divide(self._sums, self._objective).values()
            wanted = {name: figures[name] for name in names} | {"grad_norm": self._norm}
            found = to_numbers(wanted | {"blocks": self._sums.blocks})
            blocks = found.pop("blocks")
            values |= found if self._teacher else {**teacherless(found), "grad_norm": found["grad_norm"]}
        numbers = self._numbers
        seconds = max(numbers["seconds"], 1e-9)
        flops = numbers["flops"] / seconds
        values |= {
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
        """Return the sums as values for JSON, which keeps them exactly."""
        sums = None if self._sums is None else [value.tolist() for value in self._sums.tensors()]
        norm = None if self._norm is None else self._norm.item()
        return {"sums": sums, "norm": norm, **self._numbers}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from the result of `state`. Raise ValueError if it has other names than this version's."""
        if set(state) != {"sums", "norm", *self._numbers}:
            raise ValueError("the sums since the last log line are those of another version")
        sums = state["sums"]
        if sums is not None:
            tensors = [torch.tensor(value, device=self._device) for value in sums]
            self._sums = LossSums.from_tensors(list(self._objective.weights), tensors)
        norm = state["norm"]
        self._norm = None if norm is None else torch.tensor(norm, device=self._device)
        self._numbers = {name: state[name] for name in self._numbers}


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: of tensors on a GPU, or of this whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
