"""Compile Triton kernels that Inductor generated to the machine code of a GPU that is not there."""

from __future__ import annotations

import importlib.util
import re
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch._inductor.runtime.triton_heuristics as heuristics
import triton
from triton.compiler import ASTSource

from tests.gpu_less.mocked.gpu import Gpu

# Sizes of a program where Inductor would try several.
SIZES = {"XBLOCK": 1024, "YBLOCK": 32, "R0_BLOCK": 2048}


def needs_of(kernels: list[tuple[str, str]], gpu: Gpu) -> list[dict[str, Any]]:
    """Return what each kernel needs: shared memory in bytes, and widths of global loads and stores.

    No kernel can be generated in this process from then on.

    Args:
        kernels: names and sources.
    """
    for kind in ("template", "reduction", "persistent_reduction", "pointwise"):
        setattr(heuristics, kind, partial(_describe, kind))
    with tempfile.TemporaryDirectory() as folder:
        return [_needs(name, source, gpu, Path(folder)) for name, source in dict(kernels).items()]


def _needs(name: str, source: str, gpu: Gpu, folder: Path) -> dict[str, Any]:
    kind, function, described = _read(name, source, folder)
    meta = described["triton_meta"]
    signature, constants = dict(meta["signature"]), dict(meta.get("constants", {}))
    for each, type_ in signature.items():
        if type_ == "constexpr" and each in function.arg_names:
            rows = each == "XBLOCK" and "reduction" in kind
            constants.setdefault(each, 1 if rows else SIZES[each])
    made = triton.compile(
        ASTSource(
            fn=function,
            signature={each: signature.get(each, "constexpr") for each in function.arg_names},
            constexprs={
                (function.arg_names.index(each),): value
                for each, value in constants.items()
                if each in function.arg_names
            },
            attrs=meta["configs"][0],
        ),
        target=gpu.target,
        options={"num_warps": described.get("num_warps", 8), "num_stages": described.get("num_stages", 1)},
    )
    found = re.findall(r"\b(ld|st)\.global[.\w:]*?(?:\.v(\d))?\.[bfsu](\d+)", made.asm["ptx"])
    widths = {(way, int(count or 1) * int(bits) // 8) for way, count, bits in found}
    return {
        "name": name,
        "kind": kind,
        "shared": made.metadata.shared,
        "loads": sorted(width for way, width in widths if way == "ld"),
        "stores": sorted(width for way, width in widths if way == "st"),
        "long_indices": "i64" in signature.values(),
    }


def _read(name: str, source: str, folder: Path) -> tuple[str, Any, dict[str, Any]]:
    """Return the kernel's kind, its function, and what Inductor says about it."""
    path = folder / f"{name[:60]}.py"
    path.write_text(source.replace("triton_helpers.set_driver_to_gpu()", ""))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return next(value for value in vars(module).values() if isinstance(value, tuple) and len(value) == 3)


def _describe(kind: str, *_: Any, **described: Any) -> Any:
    """Stand in for a decorator of generated kernels: keep what it is given."""
    return lambda function: (kind, function, described)
