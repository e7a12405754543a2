"""EAGLE-3 by naive loops in float64: one chain, one step, one head, one key at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import LlamaConfig


def norm(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of one vector."""
    return states / torch.sqrt((states * states).mean() + eps) * weight


def rotated(states: Tensor, position: int, theta: float) -> Tensor:
    """Rotate the pairs (i, i + D/2) of one head's vector."""
    half = len(states) // 2
    parts: list[Tensor] = [states[0]] * len(states)
    for i in range(half):
        angle = position * theta ** (-2 * i / len(states))
        cos, sin = math.cos(angle), math.sin(angle)
        parts[i] = states[i] * cos - states[i + half] * sin
        parts[i + half] = states[i + half] * cos + states[i] * sin
    return torch.stack(parts)


class Naive:
    """A draft by its weights.

    Args:
        weights: by the names that engines load.
        config: the draft's config.
    """

    def __init__(self, weights: Mapping[str, Tensor], config: LlamaConfig):
        self.w, self.config = weights, config
        self.theta = config.rope_parameters["rope_theta"]
        self.scale = getattr(config, "embedding_scale", None) or 1.0

    def _norm(self, states: Tensor, name: str) -> Tensor:
        return norm(states, self.w[f"{name}.weight"], self.config.rms_norm_eps)

    def hidden(self, features: Tensor) -> Tensor:
        """Hidden state `[H]` of one position's features `[L*H]`."""
        if self.config.fc_norm:
            parts = features.split(self.config.target_hidden_size)
            features = torch.cat([self._norm(part, f"fc_norm.{i}") for i, part in enumerate(parts)])
        return self.w["fc.weight"] @ features

    def projected(self, which: str, token: int, hidden: Tensor, position: int) -> list[Tensor]:
        """Vectors of each head for `q`, `k` or `v`."""
        embedding = self.w["embed_tokens.weight"][token] * self.scale
        joined = torch.cat(
            [
                self._norm(embedding, "midlayer.input_layernorm"),
                self._norm(hidden, "midlayer.hidden_norm"),
            ]
        )
        heads = (self.w[f"midlayer.self_attn.{which}_proj.weight"] @ joined).split(self.config.head_dim)
        return list(heads) if which == "v" else [rotated(head, position, self.theta) for head in heads]

    def finals(self, features: Tensor, tokens: list[int], anchor: int, fed: list[int]) -> list[Tensor]:
        """Final state `[H]` of each step of an anchor's chain.

        Args:
            features: of one document, `[T, L*H]`.
            tokens: of that document, `[T]`.
            anchor: position of the chain's first token.
            fed: token of each step, the anchor's first.
        """
        keys, values = [], []
        for row in range(anchor):
            state = self.hidden(features[row])
            keys.append(self.projected("k", tokens[row + 1], state, row))
            values.append(self.projected("v", tokens[row + 1], state, row))
        hidden, found = self.hidden(features[anchor - 1]), []
        for step, token in enumerate(fed):
            position = anchor - 1 + step
            if step:
                keys.append(self.projected("k", token, hidden, position))
                values.append(self.projected("v", token, hidden, position))
            heads = []
            queries = self.projected("q", token, hidden, position)
            group = len(queries) // self.config.num_key_value_heads
            for number, query in enumerate(queries):
                scores = [query @ key[number // group] / math.sqrt(len(query)) for key in keys]
                shares = torch.stack(scores).softmax(0)
                heads.append(sum(s * value[number // group] for s, value in zip(shares, values, strict=True)))
            hidden = hidden + self.w["midlayer.self_attn.o_proj.weight"] @ torch.cat(heads)
            inner = self._norm(hidden, "midlayer.post_attention_layernorm")
            gate, up, down = (self.w[f"midlayer.mlp.{each}_proj.weight"] for each in ("gate", "up", "down"))
            gated = gate @ inner
            hidden = hidden + down @ (gated * torch.sigmoid(gated) * (up @ inner))
            found.append(self._norm(hidden, "norm"))
            hidden = found[-1] if self.config.norm_output else hidden
        return found

    def logits(self, final: Tensor) -> Tensor:
        """Logits `[Vd]` of a final state."""
        return capped(self.w["lm_head.weight"] @ final, self.config)


def capped(logits: Tensor, config: LlamaConfig) -> Tensor:
    """Scale and cap logits as the target does."""
    logits = logits * (getattr(config, "logit_scale", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)
