"""Start the engine that the options name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from capture.engines.engine import CaptureEngine
from capture.engines.group import Group
from capture.engines.huggingface import HuggingFaceEngine
from capture.engines.options import VLLM
from capture.engines.tensor_parallel import TensorParallelEngine
from capture.engines.worker.arguments import ROOM

if TYPE_CHECKING:
    from capture.prepare import PreparedCapture


def open_engine(prepared: PreparedCapture, group: Group | None = None) -> CaptureEngine:
    """Load the target into its engine.

    Args:
        group: the processes over which transformers splits it, if it does.

    Raises:
        TargetError: the target can't be loaded.
    """
    target, options = prepared.target, prepared.options.engine
    if options.engine == VLLM:
        from capture.engines.vllm import VllmEngine

        return VllmEngine(target, prepared.layer_ids, _longest(prepared), options)
    if group is not None:
        return TensorParallelEngine(group, target, prepared.layer_ids)
    engine = HuggingFaceEngine(target.model(), prepared.layer_ids)
    if prepared.options.share_prefixes:
        engine.share_beginnings(prepared.options.batch_tokens, prepared.rope)
    return engine


def _longest(prepared: PreparedCapture) -> int:
    """Return the most tokens that the engine must take: of a sample as it is, or once it is answered."""
    return max(prepared.longest + ROOM, int(prepared.data.facts.lengths.max()))
