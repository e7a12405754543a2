"""The frozen target, wrapped so that one forward yields the draft's context and teacher states.

Public names and signatures follow NVIDIA NeMo-Automodel's documented API
(nemo_automodel.components.speculative.dspark.target).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.features import validate_target_layer_ids
from pipeline.hooks import check_states, find_decoder, find_final_norm, find_layers, input_device, tap_states


@dataclass
class DSparkTargetBatch:
    """What DSpark training needs of the target. B rows, S tokens, L layers, H hidden size."""

    target_hidden_states: Tensor
    """Context features `[B, S, L*H]`, layers concatenated in the order asked."""
    target_last_hidden_states: Tensor
    """Post-norm last hidden states `[B, S, H]`: what `lm_head` consumes."""
    input_ids: Tensor
    """`[B, S]`."""
    loss_mask: Tensor
    """`[B, S]`."""


class HFDSparkTargetModel:
    """Capture intermediate and final hidden states from a frozen Hugging Face causal LM.

    Args:
        model: any decoder-only Hugging Face model; put in eval mode.
        target_layer_ids: strictly increasing ids in the convention of `pipeline.features`.

    Raises:
        TargetError: the model's layers or final norm can't be found.
        LayerIdError: ids out of range or out of order.
    """

    def __init__(self, model: nn.Module, target_layer_ids: Sequence[int]):
        self.model = model.eval()
        self._num_layers = len(self._get_transformer_layers())
        self.target_layer_ids = validate_target_layer_ids(target_layer_ids, self._num_layers)
        self._get_final_norm()  # a target without one is refused here, not at the first batch

    def _inner_model(self) -> nn.Module:
        """The module that owns `layers` and `norm`, under any of the common nestings."""
        return find_decoder(self.model)

    def _get_transformer_layers(self) -> list[nn.Module]:
        """The decoder layers as an ordered list."""
        return find_layers(self.model)

    def _get_final_norm(self) -> nn.Module:
        """The norm whose output feeds `lm_head`."""
        return find_final_norm(self.model)

    @torch.no_grad()
    def states(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[int | str, Tensor]:
        """Run the backbone once (never the head) and return `[B, S, H]` by layer id and `"last_hidden"`.

        Inputs may be on any device. A target spread over several leaves each state where its layer is.

        Args:
            input_ids: `[B, S]`.
            attention_mask: `[B, S]`, 0 on padding. None for right-padded rows: what comes after a token
                changes nothing of a causal target's states, and without a mask its fastest attention
                runs. States of padding mean nothing then.

        Raises:
            TargetError: a layer that was asked for did not run, or gave no `[B, S, H]`.
        """
        device = input_device(self.model)
        with tap_states(self.model, self.target_layer_ids) as states:
            mask = {} if attention_mask is None else {"attention_mask": attention_mask.to(device)}
            self._inner_model()(input_ids=input_ids.to(device), use_cache=False, **mask)
        check_states(self.model, states, [*self.target_layer_ids, "last_hidden"], input_ids.shape)
        return states

    def generate_batch(
        self, input_ids: Tensor, attention_mask: Tensor, loss_mask: Tensor
    ) -> DSparkTargetBatch:
        """Run the target once and capture context features and the post-norm last hidden state.

        Args:
            input_ids: `[B, S]`, right-padded; the states come back on its device.
            attention_mask: `[B, S]`, 0 on padding.
            loss_mask: `[B, S]`, passed through.
        """
        states = {k: v.to(input_ids.device) for k, v in self.states(input_ids, attention_mask).items()}
        return DSparkTargetBatch(
            target_hidden_states=torch.cat([states[i] for i in self.target_layer_ids], dim=-1),
            target_last_hidden_states=states["last_hidden"],
            input_ids=input_ids,
            loss_mask=loss_mask,
        )

    def get_input_embeddings(self) -> nn.Embedding:
        """The target's token embedding."""
        return self.model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The target's `lm_head`."""
        return self.model.get_output_embeddings()
