"""Sampling of vLLM on a CPU, where Triton's kernels are interpreted: one does not run, others are slow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm.v1.sample.ops import topk_topp_sampler
from vllm.v1.worker.gpu.sample import gumbel, logprob, prompt_logprob
from vllm.v1.worker.gpu.spec_decode import rejection_sampler_utils


class OneProgram:
    """A kernel that draws tokens, with the vocabulary as a single block.

    It has a program for each 1,024 tokens of the vocabulary. Random numbers depend on the token, not on the
    block, so that a larger block draws the same one.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, int]) -> Callable[..., None]:
        def launch(*arguments: Any, BLOCK_SIZE: int, **options: Any) -> None:  # noqa: N803
            block_maxima, vocabulary = arguments[2], arguments[-1]
            block_maxima.fill_(float("-inf"))  # [rows, blocks], of which the first block is written
            size = 1 << (vocabulary - 1).bit_length()
            self._kernel[grid[0], 1](*arguments, BLOCK_SIZE=size, **options)

        return launch


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities of tokens `[n, k]` under logits `[n, V]`."""
    return logits.float().log_softmax(-1).gather(-1, tokens.long())


def install() -> None:
    """Replace the kernels."""
    topk_topp_sampler.apply_top_k_top_p_triton = topk_topp_sampler.apply_top_k_top_p_pytorch
    rejection_sampler_utils._resample_kernel = OneProgram(rejection_sampler_utils._resample_kernel)
    gumbel._gumbel_sample_kernel = OneProgram(gumbel._gumbel_sample_kernel)
    logprob.compute_token_logprobs = prompt_logprob.compute_token_logprobs = token_logprobs
