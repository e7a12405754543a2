"""Folder that tokenised data is kept in between commands."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from pipeline.errors import WriteError
from pipeline.text import reason


def token_cache() -> Path:
    """Return the folder of tokenised data: $DSPARK_TOKENS, or dspark/tokens in the user's cache folder.

    Raises:
        WriteError: $DSPARK_TOKENS is not set, and the user has no home directory.
    """
    folder = os.environ.get("DSPARK_TOKENS")
    if folder:
        return Path(folder)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dspark" / "tokens"
    except RuntimeError:
        raise WriteError(
            "tokenised data has no folder ($HOME is not set): set $DSPARK_TOKENS to one that can be written"
        ) from None


def make_writable(folder: Path) -> None:
    """Make the folder of tokenised data. Raise WriteError if no file can be made in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise WriteError(
            f"tokenised data can't be kept in {folder} ({reason(error)}): set $DSPARK_TOKENS to a "
            "folder that can be written"
        ) from None
