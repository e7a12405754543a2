"""RoPE whose frequencies depend on the length of a forward: longrope and dynamic NTK.

transformers chooses the frequencies of a forward from its longest row. A row batched with longer ones may
then get other states than alone. `RopeLengths` says which lengths may share a forward, `independent_rope`
makes a forward forget the ones before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

# Types whose frequencies are the same at every length, by their names in configs.
STATIC_TYPES = ("default", "linear", "yarn", "llama3", "proportional", "mrope", "axial")
# Other names of longrope, in configs of models with code of their own.
_LONGROPE = ("longrope", "su")
# Switches to dynamic NTK in configs of models with code of their own.
_FLAGS = ("use_dynamic_ntk",)
# Module attributes that a forward with dynamic frequencies leaves for the next one.
_CACHED = "seq_len_cached"


@dataclass(frozen=True)
class LengthRope:
    """Length-dependent frequencies of a target. Rows up to `limit` tokens share one set of them."""

    kind: str
    """longrope, dynamic, or the config's own name."""
    limit: int
    """Tokens; 0 if it is unknown."""
    each: bool
    """True if every length beyond the limit has frequencies of its own; False if one set serves them all."""

    def group(self, lengths: np.ndarray) -> np.ndarray:
        """Return numbers `[n]`, equal for lengths with the same frequencies. They never fall with length."""
        lengths = lengths.astype(np.int64)
        beyond = lengths > self.limit
        return np.where(beyond, lengths, 0) if self.each else beyond.astype(np.int64)


@dataclass(frozen=True)
class RopeLengths:
    """All length-dependent frequencies of a target; layers of several types may have several."""

    ropes: tuple[LengthRope, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.ropes)

    def groups(self, lengths: np.ndarray) -> np.ndarray:
        """Return numbers `[n]`, equal for lengths that may share a forward."""
        # Sums are equal only if all terms are, because no term falls with length.
        return sum((rope.group(lengths) for rope in self.ropes), np.zeros(len(lengths), np.int64))

    def matter(self, lengths: np.ndarray) -> bool:
        """Return whether these rows have different frequencies."""
        return len(np.unique(self.groups(lengths))) > 1

    def describe(self) -> str:
        """Return kinds and limits in a few words."""
        return "; ".join(
            f"{rope.kind}, other frequencies "
            + (f"beyond {rope.limit:,} tokens" if rope.limit else "for every length")
            for rope in self.ropes
        )


def rope_lengths(config: Any, model: nn.Module | None = None) -> RopeLengths:
    """Find the length-dependent frequencies that a target's Hugging Face config asks for.

    Args:
        model: its model. A type that this module doesn't know counts as length-dependent unless the model is
            transformers' own, which knows no other such types; None is a model of transformers.
    """
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    foreign = model is not None and not type(model).__module__.startswith("transformers.")
    ropes = dict.fromkeys(
        rope for parameters in _parameters(config) if (rope := _length_rope(config, parameters, foreign))
    )
    if any(getattr(config, flag, False) for flag in _FLAGS) and foreign:
        ropes[LengthRope("dynamic NTK", 0, each=True)] = None
    return RopeLengths(tuple(ropes))


def trained_positions(config: Any) -> int | None:
    """Return the positions of a Hugging Face config, as its RoPE extends them; None if it names none."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return None
    extended = [positions]
    for parameters in _parameters(config):
        factor = parameters.get("factor") or 1
        dynamic = "dynamic" in str(parameters.get("rope_type") or parameters.get("type"))
        before = positions if dynamic else parameters.get("original_max_position_embeddings")
        extended.append(int((before or 0) * factor))
    return max(extended)


def _parameters(config: Any) -> Iterator[dict[str, Any]]:
    """Yield the config's RoPE parameters: one dict, or one per type of layers."""
    for name in ("rope_parameters", "rope_scaling"):
        found = getattr(config, name, None)
        if isinstance(found, dict):
            nested = [value for value in found.values() if isinstance(value, dict)]
            yield from nested or [found]


def _length_rope(config: Any, parameters: dict[str, Any], foreign: bool) -> LengthRope | None:
    """Return the length dependence of one set of RoPE parameters; None if there is none."""
    kind = str(parameters.get("rope_type") or parameters.get("type") or "default")
    positions = getattr(config, "max_position_embeddings", None) or 0
    if kind in _LONGROPE:
        own = parameters.get("original_max_position_embeddings")
        limit = own or getattr(config, "original_max_position_embeddings", None) or positions
        return LengthRope("longrope", int(limit), each=False)
    if "dynamic" in kind:  # as transformers asks; Hunyuan's fixed alpha makes it static
        if parameters.get("alpha") and not foreign:
            return None
        return LengthRope(kind, int(positions), each=True)
    return LengthRope(kind, 0, each=True) if foreign and kind not in STATIC_TYPES else None


def independent_rope(model: nn.Module) -> None:
    """Make every forward use the frequencies of its own length, whatever ran before.

    Modules with dynamic frequencies keep those of the longest forward so far, until a short one comes.
    Before each of their forwards they are put back to what they were when they were built. A second call
    changes nothing.
    """
    if not any(rope.each for rope in rope_lengths(getattr(model, "config", None), model).ropes):
        return
    for module in model.modules():
        kept = [name for name in vars(module) if name.endswith(_CACHED)]
        if kept and not hasattr(module, "_forgets_lengths"):
            module._forgets_lengths = True
            module.register_forward_pre_hook(_forget(module, kept))


def _forget(module: nn.Module, kept: list[str]) -> Any:
    """Return a hook that puts a module's cached length and frequencies back to their first values."""
    first = {name: getattr(module, name) for name in kept}
    buffers: dict[str, Tensor] = {}
    for name, buffer in module.named_buffers(recurse=False):
        prefix, frequencies, _ = name.partition("inv_freq")
        original = getattr(module, f"{prefix}original_inv_freq", None) if frequencies else None
        buffers[name] = (buffer if original is None else original).detach().clone()

    def forget(module: nn.Module, _args: Any) -> None:
        for name in [name for name in vars(module) if name.endswith(_CACHED)]:
            # transformers names the first length, also of a module that has seen longer forwards.
            setattr(module, name, getattr(module, "original_max_seq_len", first.get(name, 0)))
        for name, value in buffers.items():
            module.register_buffer(name, value.to(getattr(module, name).device), persistent=False)

    return forget
