"""Keep other libraries' progress bars and warnings out of ours."""

from __future__ import annotations


def quiet_transformers() -> None:
    """Silence the bars and notices that transformers prints while it loads and saves models."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
