"""The states of a cache and their codecs, as its identity names them. See FORMAT.md."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from pipeline import config
from pipeline.errors import ConfigError

# Value of `last_hidden` and of `last_codec` in a cache without last hidden states.
NO_LAST_HIDDEN = "none"


@dataclass(frozen=True, kw_only=True)
class FeatureIdentity:
    """The stored states and their codecs."""

    layer_ids: tuple[int, ...]
    context_codec: str
    last_codec: str
    """`none` if the cache has no last hidden states."""
    last_hidden: Literal["post_norm", "none"] = "post_norm"
    """Last hidden states are those after the final norm, or are left out."""

    def __post_init__(self) -> None:
        if (self.last_codec == NO_LAST_HIDDEN) != (self.last_hidden == NO_LAST_HIDDEN):
            raise ConfigError(
                f"last_codec {config.show(self.last_codec)} contradicts last_hidden "
                f"{config.show(self.last_hidden)}: expected both to be none, or neither"
            )

    @property
    def has_last_hidden(self) -> bool:
        """True if last hidden states are stored."""
        return self.last_hidden != NO_LAST_HIDDEN

    @property
    def codecs(self) -> tuple[str, ...]:
        """Names of the codecs in use."""
        return (self.context_codec, self.last_codec) if self.has_last_hidden else (self.context_codec,)

    def stored_as(self, context_codec: str, last_codec: str) -> FeatureIdentity:
        """Return the same states by other codecs; `last_codec` "none" leaves last hidden states out."""
        last_hidden = NO_LAST_HIDDEN if last_codec == NO_LAST_HIDDEN else "post_norm"
        return replace(self, context_codec=context_codec, last_codec=last_codec, last_hidden=last_hidden)


def codec_words(context_codec: str, last_codec: str) -> str:
    """Return the codecs of a cache for the terminal: `nf4 context, int8 last hidden`."""
    return f"{context_codec} context, {'no' if last_codec == NO_LAST_HIDDEN else last_codec} last hidden"
