"""The engine that ran the target, as a cache's identity names it. See FORMAT.md."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class EngineIdentity:
    """An engine other than transformers in one process."""

    name: str
    """vllm; or huggingface, split over several processes."""
    version: str = ""
    """Of vllm; empty for huggingface."""
    tensor_parallel: int = 1
    """Ranks over which every layer was split."""
    quantization: str = ""
    """Form of the weights that it computed with; empty for plain ones."""
    arguments: dict[str, str] = field(default_factory=dict)
    """Its arguments that the user gave, but for those that fit it to a machine: JSON by name."""


def engine_words(engine: EngineIdentity | None) -> str:
    """Return an engine for messages, all of it: two engines with the same words are the same."""
    if engine is None:
        return "huggingface"
    parts = [f"{engine.name} {engine.version}".strip()]
    parts += [engine.quantization] * bool(engine.quantization)
    parts += [f"tensor parallel {engine.tensor_parallel}"] * (engine.tensor_parallel > 1)
    parts += [f"{name}={value}" for name, value in engine.arguments.items()]
    return ", ".join(parts)
