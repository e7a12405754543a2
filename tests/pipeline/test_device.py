"""Devices by name, on machines that this one may not be."""

from __future__ import annotations

import pytest
import torch

from pipeline.device import native_bf16, resolve_device
from pipeline.errors import UsageError
from train.runtime.precision import autocast, resolve_precision


def test_without_a_gpu_auto_is_the_cpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == torch.device("cpu")


@pytest.mark.parametrize(("name", "wanted"), [("auto", "cuda:2"), ("cuda", "cuda:2"), ("cuda:1", "cuda:1")])
def test_a_gpu_has_its_number(monkeypatch, name: str, wanted: str) -> None:
    """torch.cuda.set_device refuses one without."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    real = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *shape, device: real(*shape))  # as if it computed
    assert resolve_device(name) == torch.device(wanted)


@pytest.mark.parametrize("name", ["cuda:77", "meta", "toaster"])
def test_what_torch_lacks_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=name):
        resolve_device(name)


@pytest.mark.parametrize("name", ["avx512_bf16", "amx_bf16", "bf16"])  # the last one is Arm's
def test_a_cpu_with_any_of_these_has_bf16(monkeypatch, name: str) -> None:
    cpu = torch.device("cpu")
    others = {"architecture": "any", "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: others | {name: True}, raising=False)
    assert native_bf16(cpu)
    assert (resolve_precision(cpu, "auto"), resolve_precision(cpu, "fp32")) == ("bf16", "fp32")
    assert autocast(cpu, "auto")._enabled


def test_a_cpu_without_is_one_that_computes_in_fp32(monkeypatch) -> None:
    cpu = torch.device("cpu")
    without = {"architecture": "x86_64", "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: without, raising=False)
    assert not native_bf16(cpu)
    assert (resolve_precision(cpu, "auto"), resolve_precision(cpu, "bf16")) == ("fp32", "bf16")
    assert not autocast(cpu, "auto")._enabled
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # an older torch can't tell
    assert not native_bf16(cpu)
