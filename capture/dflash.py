"""The target wrapper for DFlash drafts: context features only, any set of layers, no shift.

Public names and signatures follow NVIDIA NeMo-Automodel's documented API
(nemo_automodel.components.speculative.dflash.target).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.features import validate_target_layer_ids
from pipeline.hooks import check_states, find_decoder, find_layers, input_device, tap_states


@dataclass
class DFlashTargetBatch:
    """What DFlash training needs of the target. B rows, S tokens, L layers, H hidden size."""

    hidden_states: Tensor
    """Context features `[B, S, L*H]`."""
    input_ids: Tensor
    """`[B, S]`."""
    attention_mask: Tensor
    """`[B, S]`."""
    loss_mask: Tensor
    """`[B, S]`."""


class HFDFlashTargetModel:
    """Capture a set of decoder layers' hidden states from a frozen Hugging Face causal LM.

    Args:
        model: any decoder-only Hugging Face model; put in eval mode.
        target_layer_ids: strictly increasing ids in the convention of `pipeline.features`.
    """

    def __init__(self, model: nn.Module, target_layer_ids: Sequence[int]):
        self.model = model.eval()
        self.target_layer_ids = self._validate_layer_ids(target_layer_ids)

    def _get_transformer_layers(self) -> list[nn.Module]:
        """The decoder layers as an ordered list."""
        return find_layers(self.model)

    def _validate_layer_ids(self, target_layer_ids: Sequence[int]) -> list[int]:
        """The ids as a list. Raises LayerIdError (a ValueError) when they do not fit the model."""
        return validate_target_layer_ids(target_layer_ids, len(self._get_transformer_layers()))

    @torch.no_grad()
    def generate_batch(
        self, input_ids: Tensor, attention_mask: Tensor, loss_mask: Tensor
    ) -> DFlashTargetBatch:
        """Run the target's backbone once and capture the chosen layers as context.

        Args:
            input_ids: `[B, S]`, right-padded; the states come back on its device.
            attention_mask: `[B, S]`, 0 on padding.
            loss_mask: `[B, S]`, passed through.
        """
        device = input_device(self.model)
        with tap_states(self.model, self.target_layer_ids, last_hidden=False) as states:
            find_decoder(self.model)(
                input_ids=input_ids.to(device), attention_mask=attention_mask.to(device), use_cache=False
            )
        check_states(self.model, states, self.target_layer_ids, input_ids.shape)
        # A target that is spread over several devices leaves each state where its layer is.
        hidden_states = torch.cat([states[i].to(input_ids.device) for i in self.target_layer_ids], dim=-1)
        return DFlashTargetBatch(hidden_states, input_ids, attention_mask, loss_mask)

    def get_input_embeddings(self) -> nn.Embedding:
        """The target's token embedding."""
        return self.model.get_input_embeddings()
