"""Chunks of the pass over the vocabulary on a GPU, and what its products write."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.errors import ConfigError
from train.draft.settings import run_config
from train.losses import chunks
from train.losses.chunks import add_product, chunk_rows
from train.losses.fused import resolve_kernel
from train.trainer.setup import set_up

pytestmark = pytest.mark.gpu_less
CUDA = torch.device("cuda", 0)
VOCAB, SLOTS = 151_936, 512 * 7  # Qwen3's, of a full pack
GB = 10**9


@pytest.fixture(autouse=True)
def memory_is_asked_for_anew() -> Iterator[None]:
    chunks._cuda_elements.cache_clear()
    yield
    chunks._cuda_elements.cache_clear()


def with_memory(monkeypatch: pytest.MonkeyPatch, free: int) -> list[torch.device]:
    """Pretend free memory; return the devices that were asked for it."""
    asked: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (asked.append(device), (free, free))[1])
    return asked


@pytest.mark.parametrize(("free", "rows"), [(70 * GB, 1792), (12 * GB, 896), (3 * GB, 512), (0, 512)])
def test_a_chunk_has_as_many_rows_as_memory_allows(monkeypatch, free: int, rows: int) -> None:
    """On an 80 GB card two chunks; on a 24 GB card beside a draft of its own size more."""
    with_memory(monkeypatch, free)
    assert chunk_rows(SLOTS, VOCAB, CUDA) == rows


def test_memory_is_looked_at_once(monkeypatch) -> None:
    asked = with_memory(monkeypatch, 70 * GB)
    for slots in (SLOTS, 100, 3000):
        chunk_rows(slots, VOCAB, CUDA)
    assert asked == [CUDA]


@pytest.mark.parametrize("slots", [0, 1, 127, 128, 1793, 3300, SLOTS])
@pytest.mark.parametrize("vocab", [47, 49_152, VOCAB, 262_144])
def test_chunks_are_equal_and_whole_tiles(monkeypatch, slots: int, vocab: int) -> None:
    with_memory(monkeypatch, 70 * GB)
    rows = chunk_rows(slots, vocab, CUDA)
    assert rows % 128 == 0
    assert rows * vocab <= 2**28 + 128 * vocab
    count = -(-slots // rows)
    assert count * rows - slots < 128 * max(1, count)  # no chunk is nearly empty


def test_a_cpus_chunks_are_what_they_were() -> None:
    assert chunk_rows(896, 49_152, torch.device("cpu")) == 299
    assert chunk_rows(7, 10**9, torch.device("cpu")) == 7


class Recorder(TorchDispatchMode):
    """Notes what computes. What adds to a given tensor is not carried out: only CUDA can."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "aten":
            self.seen.append(str(func))
        return kwargs["out"] if "out" in kwargs else func(*args, **kwargs)


@pytest.mark.parametrize(
    ("able", "operations"),
    [(True, ["aten.addmm.dtype_out"]), (False, ["aten.mm.dtype", "aten.add_.Tensor"])],
    ids=["torch 2.9", "before"],
)
def test_a_weights_gradient_is_added_up_by_the_product_itself(monkeypatch, able, operations) -> None:
    """Of a weight `[V, R]`: a product of its own, then added, would write and read it once more a chunk."""
    monkeypatch.setattr(chunks, "ADDS_IN_FP32", able)
    with FakeTensorMode(), torch.no_grad():
        out = torch.empty(64, 8, device=CUDA)
        left, right = (torch.empty(*s, device=CUDA, dtype=torch.bfloat16) for s in ((64, 16), (16, 8)))
        with Recorder() as recorder:
            add_product(out, left, right)
    assert [each for each in recorder.seen if each != "aten.view.default"] == operations


@pytest.fixture
def nvidia(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)


def test_auto_is_the_kernel_where_it_runs(nvidia) -> None:
    assert resolve_kernel("auto", CUDA) == resolve_kernel("triton", CUDA) == "triton"
    assert resolve_kernel("torch", CUDA) == "torch"
    assert resolve_kernel("auto", torch.device("cpu")) == "torch"
    assert resolve_kernel("auto", CUDA, frozen=False) == "torch"


@pytest.mark.parametrize(
    ("name", "value", "needs"),
    [
        ("torch.version.cuda", None, "an NVIDIA GPU, got device cuda:0"),
        ("torch.cuda.get_device_capability", lambda _: (7, 5), "compute capability 8.0 or more, got 7.5"),
        ("importlib.util.find_spec", lambda _: None, "the package triton, which is not installed"),
    ],
)
def test_what_the_kernel_lacks_is_said(nvidia, monkeypatch, name: str, value, needs: str) -> None:
    monkeypatch.setattr(name, value)
    assert resolve_kernel("auto", CUDA) == "torch"
    with pytest.raises(ConfigError, match=f'loss.kernel = "triton" needs .*{needs}: set it to "auto"'):
        resolve_kernel("triton", CUDA)


def test_the_kernel_needs_a_frozen_head(nvidia) -> None:
    with pytest.raises(ConfigError, match="a frozen head"):
        resolve_kernel("triton", CUDA, frozen=False)


def test_it_is_refused_before_a_run_begins(nvidia, cache_dir: Path, tmp_path: Path) -> None:
    """Setting up checks what the kernel needs of the draft too."""
    own = {"kind": "eagle3", "train_head": True}
    config = run_config({"draft": own, "loss": {"kernel": "triton"}, "train": {"held_out": 0.2}})
    with pytest.raises(ConfigError, match="a frozen head"):
        set_up(cache_dir, config, CUDA)
    set_up(
        cache_dir,
        dataclasses.replace(config, draft=dataclasses.replace(config.draft, train_head=False)),
        CUDA,
    )
