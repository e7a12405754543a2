"""Called in a process with pretend GPUs: commands while something is wrong."""

from __future__ import annotations

from unittest.mock import patch

import torch

from capture.target import HFDSparkTargetModel


def capture_out_of_memory(*words: str) -> None:
    """Capture on a GPU that holds one row of a batch, no more."""
    from pipeline.cli import cli

    plain = HFDSparkTargetModel.states

    def states(self: HFDSparkTargetModel, input_ids: torch.Tensor, *rest: torch.Tensor) -> dict:
        found = plain(self, input_ids, *rest)  # some of it fits
        if len(input_ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return found

    with patch.object(HFDSparkTargetModel, "states", states):
        cli.main(list(words), standalone_mode=False)
