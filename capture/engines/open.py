"""Start the engine that the options name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from capture.engines.engine import CaptureEngine
from capture.engines.huggingface import HuggingFaceEngine

if TYPE_CHECKING:
    from capture.prepare import PreparedCapture


def open_engine(prepared: PreparedCapture) -> CaptureEngine:
    """Load the target into its engine.

    Raises:
        TargetError: the target can't be loaded.
    """
    return HuggingFaceEngine(prepared.target.model(), prepared.layer_ids)
