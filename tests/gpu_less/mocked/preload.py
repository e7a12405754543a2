"""Build the library that a process with a mocked GPU has to load before torch."""

from __future__ import annotations

import atexit
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

SOURCE = Path(__file__).with_name("guard.cpp")
ROOT = Path(__file__).parents[3]
BUILT = ROOT / ".cache" / "mocked"


def environment() -> dict[str, str]:
    """Return the environment of such a process; skip the test where it can't be had."""
    if torch.version.cuda is not None or torch.version.hip is not None:
        pytest.skip("needs a build of torch without CUDA, which this one would shadow")
    if importlib.util.find_spec("triton") is None:
        pytest.skip("needs triton")
    compiler, installed = shutil.which("g++"), Path(torch.__file__).parent
    if compiler is None or not (installed / "include").is_dir():
        pytest.skip("needs g++ and torch's headers")
    built = f"{torch.__version__} {installed}"  # it is linked with the torch of this place
    key = hashlib.sha256(SOURCE.read_bytes() + built.encode()).hexdigest()[:16]
    library = folder() / f"guard-{key}.so"
    if not library.exists():
        made = library.with_suffix(f".{os.getpid()}")
        headers = [f"-I{installed / each}" for each in ("include", "include/torch/csrc/api/include")]
        linked = [f"-L{installed / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{installed / 'lib'}"]
        flags = ["-O1", "-std=c++20", "-shared", "-fPIC", *headers]
        subprocess.run([compiler, *flags, SOURCE, "-o", made, *linked], check=True)
        made.rename(library)  # workers of one session may build it at the same time
    threads = dict.fromkeys(("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"), "1")
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {"LD_PRELOAD": str(library), "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1", "PYTHONPATH": path}
    return {**os.environ, **threads, **own}


def run(module: str, *arguments: str) -> Any:
    """Run a module of this package in such a process; return what it prints last, as JSON."""
    command = [sys.executable, "-m", f"{__package__}.{module}", *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def folder() -> Path:
    """Return where the library is built: beside the code, or where that can't be, a temporary folder."""
    if not set(" :") & set(str(BUILT)):  # each ends a path of LD_PRELOAD
        try:
            BUILT.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=BUILT):
                return BUILT
        except OSError:  # a checkout that is read-only, or another user's
            pass
    return _temporary()


@cache
def _temporary() -> Path:
    made = tempfile.mkdtemp(prefix="dspark-mocked-")
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return Path(made)
