"""Settings of `[draft]` that block drafters share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from train.config import DraftConfig, require


@dataclass(frozen=True, kw_only=True)
class BlockDraftConfig(DraftConfig):
    """`[draft]` of a block drafter."""

    num_layers: int = 5
    """Draft decoder layers."""
    block_size: int = 7
    """Rows of a block: the anchor's and those of mask tokens."""
    mask_token_id: int | None = None
    """Id that stands for a token to be drafted; an id that the tokenizer does not use when not set."""
    sliding_window: int | None = None
    """Positions that a slot of a sliding layer sees, its own included; layers see everything when not set."""
    layer_types: tuple[Literal["sliding_attention", "full_attention"], ...] | None = None
    """Attention of each layer; all slide when not set and sliding_window is."""
    init: Literal["random", "ridge"] = "random"
    """Initial weights: ridge sets fc, the first layer and a Markov head by regression on the cache."""
    attention: Literal["auto", "sdpa", "flex"] = "auto"
    """Attention kernel: flex skips what a block can't see; auto is flex if it runs on the CUDA device."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_layers", "block_size"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, got {getattr(self, name)}")
        self._check_window()
        require(
            self.init_from is None or self.init == "random",
            f'init_from and init = "{self.init}" both set the initial weights: set only one of them',
        )

    def _check_window(self) -> None:
        """Raise ConfigError if the window and the layers' types don't fit each other."""
        window, types = self.sliding_window, self.layer_types
        require(
            # Engines differ on which of a block's own slots lie outside a shorter window.
            window is None or window >= self.block_size,
            f"sliding_window must be at least block_size = {self.block_size}, so that a block sees itself, "
            f"got {window}",
        )
        require(
            types is None or len(types) == self.num_layers,
            f"layer_types must have num_layers = {self.num_layers} entries, got {len(types or ())}",
        )
        require(
            window is not None or "sliding_attention" not in (types or ()),
            "layer_types has sliding_attention, but sliding_window is not set: set its number of positions",
        )
        require(
            window is None or types is None or "sliding_attention" in types,
            f"sliding_window is {window}, but layer_types has no sliding_attention: remove one of them",
        )
