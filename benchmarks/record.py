"""Output of benchmark figures: a table on the terminal and rows in results.csv."""

from __future__ import annotations

import csv
import datetime
import platform
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results.csv"
FIELDS = ["date", "benchmark", "case", "metric", "value", "unit", "device", "torch", "transformers"]


def device_name(device: torch.device) -> str:
    """Return the name of the device: the GPU's, or the CPU's with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def record(benchmark: str, device: torch.device, rows: list[tuple[str, str, float, str]]) -> None:
    """Print `(case, metric, value, unit)` rows and append them to results.csv."""
    import transformers

    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(FIELDS)
        for case, metric, value, unit in rows:
            print(f"{case:40} {metric:24} {value:12.4g} {unit}")
            today = datetime.date.today().isoformat()
            where = (device_name(device), torch.__version__, transformers.__version__)
            writer.writerow([today, benchmark, case, metric, f"{value:.6g}", unit, *where])
