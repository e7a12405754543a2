"""Every codec on a GPU that is not there: capture's and the loader's only computations beside the models."""

from __future__ import annotations

import pytest

from pipeline.cache.codecs import CODECS
from tests.gpu_less.mocked.preload import run

pytestmark = pytest.mark.gpu_less


def test_codecs_stay_on_the_gpu_and_only_the_check_of_fp16_waits_for_it() -> None:
    operations = run("codecs")
    assert list(operations) == list(CODECS)
    waits = [name for name, own in operations.items() if "aten::_local_scalar_dense" in own]
    assert waits == ["fp16"]  # whose values may be too large for it
