"""Errors that a user can cause. The command line prints each as one line.

A message says what was expected, what was got and what to do. `exit_code` is 2 for an invalid request (usage)
and 1 for a valid one that failed.
"""

from __future__ import annotations


class DSparkError(Exception):
    """Base class of every error that the project raises on purpose."""

    exit_code = 1


class UsageError(DSparkError):
    """The request itself is invalid: an option, a name, a combination."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration file or an override is invalid."""


class LayerIdError(UsageError, ValueError):
    """Layer ids are not strictly increasing integers inside the target."""


class LayerIdWarning(UserWarning):
    """Layer ids that can be captured and trained on, but not served by SGLang."""


class TargetError(DSparkError):
    """The target model can't be found, loaded or captured faithfully."""


class DataError(DSparkError):
    """The conversations can't be read or rendered."""


class CacheError(DSparkError):
    """A cache is missing, incomplete, foreign, newer than this version, or damaged."""


class WriteError(DSparkError):
    """A file can't be written: the disk is full, permission is missing, or the file system failed."""


class StoppedError(DSparkError):
    """A signal stopped the command; everything finished before is kept."""

    def __init__(self, signal_number: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + signal_number  # as a shell reports it


class EngineError(DSparkError):
    """An engine, a process of its own, can't be started, or failed."""


class RunError(DSparkError):
    """A training run's directory is missing, taken or unusable."""
