"""Public import path of the DFlash names in `capture.target`."""

from capture.target import DFlashTargetBatch, HFDFlashTargetModel

__all__ = ["DFlashTargetBatch", "HFDFlashTargetModel"]
