"""Called in a process with pretend GPUs: one forward of capture for each family of targets."""

from __future__ import annotations

import warnings

import pytest
import torch

from tests.capture.test_families import FAMILIES, make_batch, make_model, wrap
from tests.gpu_less.pretend import LEDGER


def waits() -> dict[str, list[str] | str]:
    """Return what made the host wait in a forward of each family; a text says why there was none."""
    found: dict[str, list[str] | str] = {}
    ids, _ = make_batch()
    for family in FAMILIES:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                target = wrap(make_model(family).to("cuda"))
                target.states(ids.to("cuda"))  # the first forward may set things up
                LEDGER.take()
                target.states(ids.to("cuda"))
        except pytest.skip.Exception as reason:
            found[family] = str(reason)
            continue
        except Exception as error:
            found[family] = f"{type(error).__name__}: {error}"
            continue
        notes = LEDGER.take()["syncs"]
        copied = [note for note in notes if note.what == "copy to the GPU" and not note.library]
        found[family] = [f"{n} x {note}" for note, n in notes.items() if note not in copied]
    torch.manual_seed(0)
    return found
