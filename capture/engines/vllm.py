"""The target in vLLM, in a process of its own, which hands its states over through files in memory.

vLLM's layer id i is the stream before layer i, so it is one higher than ours, and its last one comes from
before the final norm. That norm is applied here, by the target's own module and weights.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from capture.console import note
from capture.data.conversations import TokenizedSample
from capture.data.preparation import stop_ids
from capture.engines.checks import row_peaks
from capture.engines.engine import States
from capture.engines.folder import states_folder
from capture.engines.frozen import FrozenWeights, frozen_weights
from capture.engines.huggingface import HuggingFaceEngine
from capture.engines.identity import engine_python
from capture.engines.options import EngineOptions
from capture.engines.proof import PROOF_TOKENS, prove_same, stored_teacher
from capture.engines.stream import Answer, Request, Stream
from capture.engines.worker_process import WorkerProcess
from pipeline.cache import Identity
from pipeline.cache.layout import LAST_HIDDEN
from pipeline.cache.skipped import ALL_ZERO, FAILED
from pipeline.cache.statistics import StateCodec
from pipeline.errors import TargetError, UsageError
from pipeline.features import EMBEDDING_LAYER_ID, head_logits
from pipeline.rope import RopeLengths
from pipeline.target_model.load import Target
from pipeline.target_model.quantisation import quantisation
from pipeline.text import size

# Maximum mean difference between log-probabilities from the states and the engine's own, by dtype. Half
# precision rounds logits near 30 by up to 0.1; states from before the final norm differ by hundreds.
OWN_LOGPROBS = {torch.float32: 1e-2, torch.float16: 0.1, torch.bfloat16: 0.2}
# Bytes of an unquantised target up to which its states are also compared with transformers'.
COMPARED_BYTES = 2 * 2**30
# Rows of the head's logits computed at once.
_ROWS_AT_ONCE = 256


class VllmEngine:
    """A `CaptureEngine` on vLLM.

    Args:
        target: with a directory of safetensors.
        layer_ids: strictly increasing ids in the convention of `pipeline.features`.
        max_length: tokens of the longest sample.
        options: as the user gave them.

    Raises:
        TargetError: vLLM can't run the target, or a weight that is needed here is not in the checkpoint.
    """

    leak = "vLLM lets other rows into its states: capture with --engine-arg max_num_seqs=1"

    def __init__(self, target: Target, layer_ids: Sequence[int], max_length: int, options: EngineOptions):
        self.layer_ids, self._target = tuple(layer_ids), target
        self._facts = target.identity(hash_weights=False)
        weights: FrozenWeights = frozen_weights(target)
        self.embedding, self.head, self._norm = weights.embedding, weights.head, weights.norm
        self.device = target.device
        width = self._facts.hidden_size
        self._asked = sorted({i + 1 for i in layer_ids} | {self._facts.num_layers})
        largest = max_length * len(self._asked) * width * target.dtype.itemsize
        arguments = options.arguments()
        context = arguments.pop("max_model_len", max_length + 1)
        if not isinstance(context, int) or context <= max_length:
            raise UsageError(
                f"--engine-arg max_model_len={context}: a sample can have {max_length:,} tokens, and vLLM "
                f"needs one more: give {max_length + 1} or more, or lower --max-length"
            )
        self._folder, bound = states_folder(largest)
        config = {
            "target": str(target.directory.absolute()),
            "dtype": str(target.dtype).removeprefix("torch."),
            "layers": self._asked,
            "folder": str(self._folder),
            "max_model_len": context,
            "stop": list(stop_ids(target)),
            "tensor_parallel": options.tensor_parallel,
            "arguments": {"trust_remote_code": target.options.trust_remote_code, **arguments},
        }
        log = Path(tempfile.gettempdir()) / f"{self._folder.name}.log"
        python = engine_python(options)
        self._log = log
        try:
            self._stream = Stream(
                lambda: WorkerProcess(python, config, log),
                self._folder,
                (len(self._asked), width),
                target.dtype,
                bound,
            )
        except BaseException:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise
        facts = self._stream.facts
        quantised = f", weights {facts['quantization']}" if facts["quantization"] else ""
        backend = "" if facts["implementation"] == "vllm" else " through transformers' model code"
        note(f"vLLM {facts['version']} runs the target{backend}{quantised}; its output is in {log}")

    @property
    def while_waiting(self) -> Callable[[], None]:
        return self._stream.while_waiting

    @while_waiting.setter
    def while_waiting(self, check: Callable[[], None]) -> None:
        self._stream.while_waiting = check

    def expect(self, batches: Sequence[Sequence[TokenizedSample]]) -> None:
        """As in `CaptureEngine`. The middle sample is also compared with vLLM's own log-probabilities."""
        self._stream.drop()
        self._stream.check_folder()
        samples = [sample for batch in batches for sample in batch]
        middle = len(samples) // 2
        self._stream.expect(request(s, logprobs=i == middle) for i, s in enumerate(samples))

    @torch.no_grad()
    def states(self, batch: Sequence[TokenizedSample]) -> States:
        """As in `CaptureEngine`."""
        following = self._stream.next
        if following is None or following.tokens is not batch[0].input_ids:
            self._stream.drop()
            self._stream.expect(map(request, batch))
        return self.pack(batch, [self._stream.take() for _ in batch])

    @torch.no_grad()
    def pack(self, batch: Sequence[TokenizedSample], answers: Sequence[Answer]) -> States:
        """Return the states of a batch from the engine's answers, one per sample.

        The states of a sample's last token may be missing. They are zeros then.

        Raises:
            TargetError: states are not vLLM's own.
        """
        parts: dict[int | str, list[Tensor]] = {key: [] for key in (*self.layer_ids, LAST_HIDDEN)}
        failed, own = {}, {}
        for number, (sample, answer) in enumerate(zip(batch, answers, strict=True)):
            if answer.failure:
                note(f"warning: row {sample.source_row + 1} of the data: {answer.failure}")
                failed[number] = FAILED
            elif answer.logprobs is not None:
                own[number] = answer.logprobs
            for key, rows in self._rows(answer, len(sample.input_ids)).items():
                parts[key].append(rows)
        states = {key: torch.cat(rows) for key, rows in parts.items()}
        unread = [
            a.states is not None and len(a.states) < len(s.input_ids)
            for s, a in zip(batch, answers, strict=True)
        ]
        failed = {**_with_zero_rows(states, batch, unread, self.embedding), **failed}
        for number, logprobs in own.items():
            last = parts[LAST_HIDDEN][number]
            if number not in failed and last.isfinite().all():  # a bad sample is reported as such
                self.logprob_error(batch[number], last, logprobs)
        return States(states, failed=failed)

    def ask(self, requests: Sequence[Request]) -> Iterator[Answer]:
        """Send requests, after forgetting any others, and yield their answers in order.

        Raises:
            TargetError: as in `Stream.take`.
        """
        self._stream.drop()
        self._stream.expect(requests)
        for _ in requests:
            yield self._stream.take()

    def compare(self, sample: TokenizedSample, kept: Answer) -> float:
        """Compare kept states of a sample's tokens, all but the last, with those of a second pass.

        Returns:
            The largest relative error of a layer's states, mean over the tokens.

        Raises:
            TargetError: they differ more than the order of sums explains, or are not vLLM's own.
        """
        read = TokenizedSample(sample.source_row, sample.input_ids[:-1], sample.loss_mask[:-1])
        (again,) = self.ask([request(read, logprobs=True)])
        if again.failure:
            raise TargetError(f"row {sample.source_row + 1} of the data: {again.failure}")
        one, two = self.pack([read], [kept]), self.pack([read], [again])
        return max(prove_same(one.take(key), two.take(key), key) for key in (*self.layer_ids, LAST_HIDDEN))

    def _rows(self, answer: Answer, tokens: int) -> dict[int | str, Tensor]:
        """Return the states `[S, H]` of an answer by key, zeros if it failed or has no more."""
        states = answer.states
        if states is None:
            states = torch.zeros(
                tokens, len(self._asked), self.embedding.shape[1], dtype=self.embedding.dtype
            )
        missing = torch.zeros(tokens - len(states), *states.shape[1:], dtype=states.dtype)
        states = torch.cat([states, missing]).to(self.device) if len(missing) else states.to(self.device)
        last = self._norm(states[:, -1])
        number = {layer - 1: column for column, layer in enumerate(self._asked)}
        final = self._asked[-1] - 1  # our last id is the state after the final norm
        rows = {i: last if i == final else states[:, number[i]] for i in self.layer_ids}
        return rows | {LAST_HIDDEN: last}

    def logprob_error(self, sample: TokenizedSample, last_hidden: Tensor, own: Tensor) -> float:
        """Compare log-probabilities of a sample's tokens from its states `[S, H]` with vLLM's own, `[n]`.

        Args:
            own: of the tokens from the second on; of those that vLLM has read.

        Returns:
            The mean difference.

        Raises:
            TargetError: it is larger than rounding explains.
        """
        facts = self._facts
        tokens = torch.from_numpy(sample.input_ids.astype(np.int64))[1 : len(own) + 1].to(self.device)
        found = []
        for rows, wanted in zip(
            last_hidden[: len(own)].split(_ROWS_AT_ONCE), tokens.split(_ROWS_AT_ONCE), strict=True
        ):
            logits = head_logits(rows, self.head, facts.final_logit_softcapping, facts.logit_scale)
            found.append(-torch.nn.functional.cross_entropy(logits, wanted, reduction="none"))
        error = (torch.cat(found).cpu() - own).abs().mean().item() if found else 0.0
        limit = OWN_LOGPROBS.get(last_hidden.dtype, 0.1)
        if not error <= limit:
            raise TargetError(
                f"the last hidden states of row {sample.source_row + 1} of the data are not vLLM's own: with "
                f"the target's head they give log-probabilities that differ by {error:.3g} on average from "
                f"those that vLLM computes, expected at most {limit:g}; report it, with the versions"
            )
        return error

    @torch.no_grad()
    def prove(
        self,
        identity: Identity,
        samples: Sequence[TokenizedSample],
        last_codec: StateCodec | None,
        rope: RopeLengths,
    ) -> dict[str, float]:
        """Prove the states of samples by vLLM's log-probabilities and, of a small target, by transformers.

        Returns:
            As `prove_states`, with `proof.logprob_error` and, if compared, `proof.huggingface_error`.
        """
        errors, figures = [], {}
        for sample in samples:
            (answer,) = self.ask([request(sample, logprobs=True)])
            if answer.failure:
                raise TargetError(f"row {sample.source_row + 1} of the data: {answer.failure}")
            last = self._rows(answer, len(sample.input_ids))[LAST_HIDDEN]
            assert answer.logprobs is not None
            errors.append(self.logprob_error(sample, last, answer.logprobs))
        figures["proof.logprob_error"] = max(errors)
        figures["proof.padding_error"] = 0.0  # measured by batches, see capture.shards.evidence
        if last_codec is not None:
            figures |= stored_teacher(identity, self.head, last_codec, last[:PROOF_TOKENS])
        if self._is_small():
            figures["proof.huggingface_error"] = self._compare_with_huggingface(samples)
        return figures

    def _is_small(self) -> bool:
        count = sum(parameter.numel() for parameter in self._target.shell.parameters())
        return (
            count * self._target.dtype.itemsize <= COMPARED_BYTES
            and quantisation(self._target.config) is None
        )

    def _compare_with_huggingface(self, samples: Sequence[TokenizedSample]) -> float:
        """Return the largest relative error of a state against transformers' on the CPU, see `prove_same`."""
        target = replace(self._target, device=torch.device("cpu"))
        own, worst = HuggingFaceEngine(target.model(), self.layer_ids), 0.0
        for sample in samples:
            cut = PROOF_TOKENS
            sample = TokenizedSample(sample.source_row, sample.input_ids[:cut], sample.loss_mask[:cut])
            ours, theirs = self.states([sample]), own.states([sample])
            for key, rows in theirs.take_all().items():
                worst = max(worst, prove_same(ours.take(key).cpu(), rows, key, "of transformers"))
        return worst

    def close(self) -> None:
        """End vLLM and remove its files, but its output only if it never died."""
        self._stream.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        if not self._stream.died:
            self._log.unlink(missing_ok=True)
        note(
            f"states on their way from vLLM: at most {size(self._stream.peak)} of {size(self._stream.bound)}"
        )


def _with_zero_rows(
    states: dict[int | str, Tensor],
    batch: Sequence[TokenizedSample],
    unread: Sequence[bool],
    embedding: Tensor,
) -> dict[int, str]:
    """Return the samples with a row of zeros, which the engine did not compute.

    A token whose embedding is zero has such rows by right, in every layer if it comes first.

    Args:
        unread: samples whose last token was not read.
        embedding: the target's `[V, H]`.
    """
    rows = [row_peaks(rows) == 0 for key, rows in states.items() if key != EMBEDDING_LAYER_ID]
    zero = torch.stack(rows).any(0).cpu().numpy()
    ends = np.cumsum([len(sample.input_ids) for sample in batch])
    zero[(ends - 1)[np.array(unread, bool)]] = False
    found = zero.nonzero()[0]
    tokens = np.concatenate([sample.input_ids for sample in batch])[found].astype(np.int64)
    found = found[embedding[torch.from_numpy(tokens)].any(1).numpy()]
    return dict.fromkeys(np.searchsorted(ends, found, side="right").tolist(), ALL_ZERO)


def request(sample: TokenizedSample, logprobs: bool = False) -> Request:
    """Return the request for the states of a sample."""
    return Request(
        sample.input_ids,
        f"row {sample.source_row + 1} of the data",
        logprobs=logprobs and len(sample.input_ids) > 1,
    )
