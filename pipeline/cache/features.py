"""The states of a cache and their codecs, as its identity names them. See FORMAT.md."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from pipeline import config
from pipeline.cache.optional import LEFT_OUT
from pipeline.errors import ConfigError

# Value of `last_hidden` and of `last_codec` in a cache without last hidden states.
NO_LAST_HIDDEN = "none"
# Values of `hidden`: tokens whose last hidden states a cache holds.
LABELS, ALL_TOKENS = "labels", "all-tokens"
# Values of `prefixes`: context rows of an equal beginning are stored with each sample, or once.
EACH, ONCE = "each", "once"


@dataclass(frozen=True, kw_only=True)
class FeatureIdentity:
    """The stored states and their codecs."""

    layer_ids: tuple[int, ...]
    context_codec: str
    last_codec: str
    """`none` if the cache has no last hidden states."""
    last_hidden: Literal["post_norm", "none"] = "post_norm"
    """Last hidden states are those after the final norm, or are left out."""
    hidden: Literal["labels", "all-tokens"] = field(default="labels", metadata=LEFT_OUT)
    """Last hidden states are those of label rows, or of every token."""
    prefixes: Literal["each", "once"] = field(default="each", metadata=LEFT_OUT)
    """Context rows that samples have in common with the one before are stored with each, or once."""

    def __post_init__(self) -> None:
        if (self.last_codec == NO_LAST_HIDDEN) != (self.last_hidden == NO_LAST_HIDDEN):
            raise ConfigError(
                f"last_codec {config.show(self.last_codec)} contradicts last_hidden "
                f"{config.show(self.last_hidden)}: expected both to be none, or neither"
            )
        if self.hidden != LABELS and not self.has_last_hidden:
            raise ConfigError(
                f"hidden {config.show(self.hidden)} contradicts last_hidden {config.show(self.last_hidden)}: "
                f"expected {LABELS} without last hidden states"
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
        codecs = {"context_codec": context_codec, "last_codec": last_codec}
        if last_codec == NO_LAST_HIDDEN:
            return replace(self, **codecs, last_hidden=NO_LAST_HIDDEN, hidden=LABELS)
        return replace(self, **codecs, last_hidden="post_norm")


def codec_words(context_codec: str, last_codec: str, hidden: str = LABELS) -> str:
    """Return the codecs of a cache for the terminal: `nf4 context, int8 last hidden`."""
    last = "no" if last_codec == NO_LAST_HIDDEN else last_codec
    return f"{context_codec} context, {last} last hidden{hidden_words(hidden)}"


def hidden_words(hidden: str) -> str:
    """Return the words that follow `last hidden` where a cache has more of them than label rows."""
    return " of every token" if hidden == ALL_TOKENS else ""
