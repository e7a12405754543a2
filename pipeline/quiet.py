"""Silence other libraries' progress bars and notices."""

from __future__ import annotations


def quiet_transformers() -> None:
    """Silence transformers' progress bars and notices while it loads and saves models."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
