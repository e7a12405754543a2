"""Section `machine`: the GPU, what other sections need of it, and what its units reach."""

from __future__ import annotations

import importlib.util
from importlib.metadata import version

from benchmarks.gpu.figures import Figure, Limit, Row, SkipSection, judged
from benchmarks.gpu.place import Place
from benchmarks.gpu.timing import seconds_of


def machine(place: Place) -> list[Figure]:
    """Measure a large bf16 product and a copy: the most that other sections can hope for."""
    import torch

    sized = place.sized()
    device = torch.device("cuda", 0)
    free, total = torch.cuda.mem_get_info(device)
    name, (major, minor) = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    print(f"{name}, compute capability {major}.{minor}, shapes: {sized.size}")
    triton = version("triton") if importlib.util.find_spec("triton") else "none"
    print(f"torch {torch.__version__}, transformers {version('transformers')}, triton {triton}")
    size = sized.pick(8192, 4096, 64)
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = 2 * size**3 / seconds_of(lambda: left @ right)
    source = torch.empty(sized.pick(2**30, 2**28, 2**12), dtype=torch.uint8, device=device)
    out = torch.empty_like(source)
    copied = 2 * source.nbytes / seconds_of(lambda: out.copy_(source))
    rows: list[Row] = [
        (name, "memory", total / 2**30, "GiB"),
        (name, "free memory", free / 2**30, "GiB"),
        (name, "GPUs", torch.cuda.device_count(), ""),
        (f"product {size}^3 bf16", "product", product / 1e12, "TFLOP/s"),
        (f"copy of {source.nbytes / 2**20:.0f} MiB", "copy", copied / 1e9, "GB/s"),
    ]
    place.record("machine", rows[3:])
    return judged(rows, {"free memory": Limit(at_least=2.0)}, pretend=place.pretend)


def require_gpus(count: int) -> None:
    """Raise SkipSection on a machine with fewer GPUs."""
    import torch

    if torch.cuda.device_count() < count:
        raise SkipSection(f"needs {count} GPUs, this machine has {torch.cuda.device_count()}")
