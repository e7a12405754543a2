"""Work that the process which tests fork commands from does once, so that none of them does it again."""

from __future__ import annotations

from contextlib import suppress

import pandas  # noqa: F401  pyarrow imports it where it first meets an array of numpy's: half of a short life

with suppress(ImportError, AttributeError):  # a thousand regular expressions, which `from_pretrained` wants
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("llama")
