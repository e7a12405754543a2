"""Build the library that a process with a mocked GPU has to load before torch."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

SOURCE = Path(__file__).with_name("guard.cpp")
BUILT = Path(__file__).parents[3] / ".cache" / "mocked"


def environment() -> dict[str, str]:
    """Return the environment of such a process; skip the test where it can't be had."""
    if torch.version.cuda is not None or torch.version.hip is not None:
        pytest.skip("needs a build of torch without CUDA, which this one would shadow")
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton")
    compiler, installed = shutil.which("g++"), Path(torch.__file__).parent
    if compiler is None or not (installed / "include").is_dir():
        pytest.skip("needs g++ and torch's headers")
    key = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    library = BUILT / f"guard-{key}.so"
    if not library.exists():
        BUILT.mkdir(parents=True, exist_ok=True)
        made = library.with_suffix(f".{os.getpid()}")
        headers = [f"-I{installed / each}" for each in ("include", "include/torch/csrc/api/include")]
        linked = [f"-L{installed / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{installed / 'lib'}"]
        flags = ["-O1", "-std=c++20", "-shared", "-fPIC", *headers]
        subprocess.run([compiler, *flags, SOURCE, "-o", made, *linked], check=True)
        made.rename(library)  # workers of one session may build it at the same time
    threads = dict.fromkeys(("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"), "1")
    return {**os.environ, **threads, "LD_PRELOAD": str(library), "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}
