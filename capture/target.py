"""The frozen target, wrapped so that one forward yields what a draft needs: context and teacher states.

Public names and signatures follow NVIDIA NeMo-Automodel's documented API
(nemo_automodel.components.speculative.dspark.target and .dflash.target).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from pipeline.features import validate_target_layer_ids
from pipeline.hooks import (
    check_states,
    find_decoder,
    find_final_norm,
    find_layers,
    input_device,
    rows_taken_as_given,
    tap_states,
)
from pipeline.rope import independent_rope


@dataclass
class DSparkTargetBatch:
    """The target's part of a DSpark training batch. B rows, S tokens, L layers, H hidden size."""

    target_hidden_states: Tensor
    """Context features `[B, S, L*H]`, layers concatenated in the order of the ids."""
    target_last_hidden_states: Tensor
    """Last hidden states after the final norm `[B, S, H]`, the input of `lm_head`."""
    input_ids: Tensor
    """`[B, S]`."""
    loss_mask: Tensor
    """`[B, S]`."""


@dataclass
class DFlashTargetBatch:
    """The target's part of a DFlash training batch. B rows, S tokens, L layers, H hidden size."""

    hidden_states: Tensor
    """Context features `[B, S, L*H]`, layers concatenated in the order of the ids."""
    input_ids: Tensor
    """`[B, S]`."""
    attention_mask: Tensor
    """`[B, S]`."""
    loss_mask: Tensor
    """`[B, S]`."""


class _FrozenTarget:
    """A frozen Hugging Face causal LM and the layers to capture.

    Args:
        model: any decoder-only Hugging Face model; put in eval mode.
        target_layer_ids: strictly increasing ids in the convention of `pipeline.features`.

    Raises:
        TargetError: the model's layers can't be found.
        LayerIdError: ids out of range or out of order.
    """

    def __init__(self, model: nn.Module, target_layer_ids: Sequence[int]):
        self.model = model.eval()
        independent_rope(model)
        self._num_layers = len(self._get_transformer_layers())
        self.target_layer_ids = self._validate_layer_ids(target_layer_ids)

    def _inner_model(self) -> nn.Module:
        """Return the module that owns `layers` and `norm`, under any of the common nestings."""
        return find_decoder(self.model)

    def _get_transformer_layers(self) -> list[nn.Module]:
        """Return the decoder layers in order."""
        return find_layers(self.model)

    def _validate_layer_ids(self, target_layer_ids: Sequence[int]) -> list[int]:
        """Return the ids as a list. Raises LayerIdError (a ValueError) when they do not fit the model."""
        return validate_target_layer_ids(target_layer_ids, self._num_layers)

    def _tap(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        *,
        last_hidden: bool,
        past: Cache | None = None,
    ) -> dict[int | str, Tensor]:
        """Run the backbone once and return `[B, S, H]` by layer id, and by `"last_hidden"` if asked."""
        device = input_device(self.model)
        wanted = [*self.target_layer_ids, *(["last_hidden"] if last_hidden else [])]
        tapped = tap_states(self.model, self.target_layer_ids, last_hidden=last_hidden)
        with tapped as states, rows_taken_as_given():
            mask = {} if attention_mask is None else {"attention_mask": attention_mask.to(device)}
            cache = {"use_cache": False} if past is None else {"use_cache": True, "past_key_values": past}
            self._inner_model()(input_ids=input_ids.to(device), **cache, **mask)
        check_states(self.model, states, wanted, input_ids.shape)
        return states

    def _context(self, states: dict[int | str, Tensor], device: torch.device) -> Tensor:
        """Concatenate the layers' states to context features `[B, S, L*H]` on `device`.

        A target spread over several devices leaves each state on its layer's device.
        """
        return torch.cat([states[i].to(device) for i in self.target_layer_ids], dim=-1)

    def get_input_embeddings(self) -> nn.Embedding:
        """Return the target's token embedding."""
        return self.model.get_input_embeddings()


class HFDSparkTargetModel(_FrozenTarget):
    """Capture intermediate and final hidden states from a frozen Hugging Face causal LM.

    Args:
        model: any decoder-only Hugging Face model; put in eval mode.
        target_layer_ids: strictly increasing ids in the convention of `pipeline.features`.

    Raises:
        TargetError: the model's layers or final norm can't be found.
        LayerIdError: ids out of range or out of order.
    """

    def __init__(self, model: nn.Module, target_layer_ids: Sequence[int]):
        super().__init__(model, target_layer_ids)
        self._get_final_norm()  # refuse a target without one here, not at the first batch

    def _get_final_norm(self) -> nn.Module:
        """Return the norm whose output feeds `lm_head`."""
        return find_final_norm(self.model)

    @torch.no_grad()
    def states(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, past: Cache | None = None
    ) -> dict[int | str, Tensor]:
        """Run the backbone once (never the head) and return `[B, S, H]` by layer id and `"last_hidden"`.

        Inputs may be on any device. A target spread over several devices leaves each state on its
        layer's device.

        Args:
            input_ids: `[B, S]`.
            attention_mask: `[B, S]`, 0 on padding. None for right-padded rows: padding after a token can't
                change a causal target's states, and without a mask the target's fastest attention runs.
                The states of the padding are then meaningless.
            past: keys and values of tokens before these, to which theirs are added; None for none.

        Raises:
            TargetError: a requested layer did not run, or its output is not `[B, S, H]`.
        """
        return self._tap(input_ids, attention_mask, last_hidden=True, past=past)

    @property
    def config(self) -> Any:
        """The config of the decoder itself."""
        return self._inner_model().config

    def generate_batch(
        self, input_ids: Tensor, attention_mask: Tensor, loss_mask: Tensor
    ) -> DSparkTargetBatch:
        """Run the target once and capture context features and the last hidden state after the final norm.

        Args:
            input_ids: `[B, S]`, right-padded; the states are returned on its device.
            attention_mask: `[B, S]`, 0 on padding.
            loss_mask: `[B, S]`, passed through.
        """
        states = self.states(input_ids, attention_mask)
        return DSparkTargetBatch(
            target_hidden_states=self._context(states, input_ids.device),
            target_last_hidden_states=states["last_hidden"].to(input_ids.device),
            input_ids=input_ids,
            loss_mask=loss_mask,
        )

    def get_output_embeddings(self) -> nn.Module:
        """Return the target's `lm_head`."""
        return self.model.get_output_embeddings()


class HFDFlashTargetModel(_FrozenTarget):
    """Capture decoder layers' hidden states, without the last hidden state, for DFlash drafts.

    It gives what `dspark capture --last-hidden none` stores: all that a DFlash draft without the L1 term
    (`loss.l1_alpha` = 0) learns from, beside the tokens.

    Args:
        model: any decoder-only Hugging Face model; put in eval mode.
        target_layer_ids: strictly increasing ids in the convention of `pipeline.features`.

    Raises:
        TargetError: the model's layers can't be found.
        LayerIdError: ids out of range or out of order.
    """

    @torch.no_grad()
    def generate_batch(
        self, input_ids: Tensor, attention_mask: Tensor, loss_mask: Tensor
    ) -> DFlashTargetBatch:
        """Run the target's backbone once and capture the chosen layers as context features.

        Args:
            input_ids: `[B, S]`, right-padded; the states are returned on its device.
            attention_mask: `[B, S]`, 0 on padding.
            loss_mask: `[B, S]`, passed through.
        """
        states = self._tap(input_ids, attention_mask, last_hidden=False)
        return DFlashTargetBatch(
            self._context(states, input_ids.device), input_ids, attention_mask, loss_mask
        )
