"""Start the engine that the options name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from capture.engines.engine import CaptureEngine
from capture.engines.huggingface import HuggingFaceEngine
from capture.engines.options import VLLM

if TYPE_CHECKING:
    from capture.prepare import PreparedCapture


def open_engine(prepared: PreparedCapture) -> CaptureEngine:
    """Load the target into its engine.

    Raises:
        TargetError: the target can't be loaded.
    """
    target, options = prepared.target, prepared.options.engine
    if options.engine == VLLM:
        from capture.engines.vllm import VllmEngine

        return VllmEngine(target, prepared.layer_ids, int(prepared.data.facts.lengths.max()), options)
    return HuggingFaceEngine(target.model(), prepared.layer_ids)
