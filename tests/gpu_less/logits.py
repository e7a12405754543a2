"""Called in a process with a pretend GPU: logits in half precision."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.features import head_logits
from train.draft.dspark.markov import VanillaMarkovHead


def errors() -> dict[str, float]:
    """Return the largest error of each kind of logits, relative to the largest logit.

    The reference is float64's product of the same rounded operands.
    """
    torch.manual_seed(0)
    hidden, head = torch.randn(3, 64).bfloat16(), torch.randn(50, 64).bfloat16()
    wanted = hidden.double() @ head.double().T
    markov = VanillaMarkovHead(50, 64, 64)
    markov.markov_w2.weight.data.copy_(head)

    def error(found: Tensor) -> float:
        assert found.dtype == torch.float32
        return ((found.detach().cpu().double() - wanted).abs().max() / wanted.abs().max()).item()

    here = hidden.to("cuda")
    found = {"half": error(head_logits(here, head.to("cuda")))}
    with torch.autocast("cuda", torch.bfloat16):
        full = head.float().to("cuda")
        found["autocast"] = error(head_logits(here.float(), full))
        found["autocast, gradients"] = error(head_logits(here.float(), full.requires_grad_()))
        found["Markov bias"] = error(markov.to("cuda")(here.float()))
    return found
