"""Devices by name, on machines that this one may not be."""

from __future__ import annotations

import pytest
import torch

from pipeline.device import resolve_device
from pipeline.errors import UsageError


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
