"""The library of the mocked GPU is built where a process can load it from."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu_less.mocked import preload
from tests.machine import obeying_permissions

pytestmark = pytest.mark.gpu_less


def test_the_library_lies_beside_the_code_if_it_can(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(preload, "BUILT", tmp_path / ".cache" / "mocked")
    assert preload.folder() == tmp_path / ".cache" / "mocked"
    assert preload.folder().is_dir()


@pytest.mark.parametrize("name", ["with a space", "with:a colon"])
def test_a_path_that_a_loader_would_cut_is_avoided(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.setattr(preload, "BUILT", tmp_path / name)
    assert not set(" :") & set(str(preload.folder()))
    assert preload.folder().is_dir()


@pytest.mark.parametrize("exists", [True, False])
def test_a_checkout_may_be_read_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, exists: bool) -> None:
    built = tmp_path / "checkout" / "mocked"
    (built if exists else built.parent).mkdir(parents=True)
    monkeypatch.setattr(preload, "BUILT", built)
    (built if exists else built.parent).chmod(0o555)
    with obeying_permissions():
        assert preload.folder() == preload.folder() != built
        (preload.folder() / "written").touch()
