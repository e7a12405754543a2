"""The engine of a one-pass capture: it answers a shard's prompts, and returns the states that it kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from capture.console import note
from capture.data.conversations import TokenizedSample
from capture.engines.engine import States
from capture.engines.stream import Answer, Request
from capture.engines.vllm import VllmEngine, request
from capture.one_pass.journal import Journal
from capture.one_pass.options import AnswerOptions
from capture.one_pass.turns import Conversation, Turn
from pipeline.cache import Identity
from pipeline.cache.fidelity import Measured
from pipeline.cache.prompts import answers_file
from pipeline.cache.statistics import StateCodec
from pipeline.rope import RopeLengths

# Figure of a shard: relative errors of kept states against those of a second pass.
SECOND_PASS = "second_pass_error"


class OnePassEngine:
    """A `CaptureEngine` whose states are those of the run that sampled the answers.

    No forward reads the last token of an answer: its states are zeros, and no label follows it.

    Args:
        engine: runs the target.
        options: of the sampling.
        max_length: maximum tokens of a sample.
        cache: the directory that keeps the answers.
    """

    def __init__(self, engine: VllmEngine, options: AnswerOptions, max_length: int, cache: Path):
        self._engine, self._options, self._max_length, self._cache = engine, options, max_length, cache
        self._kept: dict[int, Answer] = {}
        """The states of samples of the shard, by the identity of their token ids."""
        self._skipped: dict[int, str] = {}
        """Reasons to skip samples of the shard, likewise."""
        self.layer_ids, self.embedding, self.head = engine.layer_ids, engine.embedding, engine.head
        self.device, self.leak, self.while_waiting = engine.device, engine.leak, engine.while_waiting
        self.measured: Measured = {}
        """Figures of the shard that was answered last."""

    def answer(self, shard: int, batches: Sequence[Sequence[TokenizedSample]]) -> list[list[TokenizedSample]]:
        """Answer every turn of a shard's samples, and keep the states of each sample's last run.

        Answers that the cache's journal has are not sampled again.

        Args:
            batches: the samples as the data has them.

        Returns:
            The answered samples in the same batches.

        Raises:
            TargetError: as in `VllmEngine.states`.
        """
        conversations = [self._conversation(sample) for batch in batches for sample in batch]
        journal = Journal(answers_file(self._cache, shard))
        journal.read(conversations)
        kept: dict[int, Answer] = {}
        asked = list(range(len(conversations)))
        while asked := [i for i in asked if conversations[i].prompt() is not None]:
            wanted = [self._request(conversations[i]) for i in asked]
            for i, answer in zip(tuple(asked), self._engine.ask(wanted), strict=True):
                if answer.failure:  # it ends with the answer before, if there is one
                    note(
                        f"warning: row {conversations[i].sample.source_row + 1} of the data: {answer.failure}"
                    )
                    asked.remove(i)
                    continue
                kept[i] = answer
                turn = Turn(tuple(answer.tokens), answer.finished == "stop")
                journal.add(i, conversations[i], turn)
                conversations[i].answers.append(turn)
        answered = [conversation.answered() for conversation in conversations]
        samples = [sample for sample, _ in answered]
        self._skipped = {id(sample.input_ids): reason for sample, reason in answered if reason}
        self._keep(samples, kept)
        numbers = iter(samples)
        return [[next(numbers) for _ in batch] for batch in batches]

    def _conversation(self, sample: TokenizedSample) -> Conversation:
        return Conversation(sample, self._max_length, self._options.max_new_tokens)

    def _request(self, conversation: Conversation) -> Request:
        prompt = conversation.prompt()
        assert prompt is not None
        sampling = {
            **vars(self._options.sampling),
            "max_new_tokens": conversation.room(prompt),
            "seed": conversation.seed(self._options.answer_seed),
            "keep": conversation.at_last_turn,
        }
        return Request(prompt, f"row {conversation.sample.source_row + 1} of the data", sampling=sampling)

    def _keep(self, samples: Sequence[TokenizedSample], kept: dict[int, Answer]) -> None:
        """Keep the states that belong to the samples as they are now, and compare one with a second pass."""
        self._kept = {}
        for i, answer in kept.items():
            ids = samples[i].input_ids
            whole = answer.states is not None and len(answer.states) == len(ids) - 1
            if whole and id(ids) not in self._skipped:
                self._kept[id(ids)] = answer
        self.measured = {}
        if self._kept:
            of_this_run = [sample for sample in samples if id(sample.input_ids) in self._kept]
            sample = of_this_run[len(of_this_run) // 2]
            error = self._engine.compare(sample, self._kept[id(sample.input_ids)])
            self.measured = {SECOND_PASS: (error,)}

    def expect(self, batches: Sequence[Sequence[TokenizedSample]]) -> None:
        """Ask for nothing: the states are there, or belong to the few samples of an interrupted run.

        Raises:
            TargetError: some came twice.
        """
        self._engine.expect(())

    def states(self, batch: Sequence[TokenizedSample]) -> States:
        """As in `CaptureEngine`. Samples that were answered before an interruption are read once more."""
        known = self._kept | dict.fromkeys(self._skipped, Answer())
        wanted = [sample for sample in batch if id(sample.input_ids) not in known]
        found = self._engine.ask([_without_last(s, logprobs=i == 0) for i, s in enumerate(wanted)])
        known |= {id(sample.input_ids): answer for sample, answer in zip(wanted, found, strict=True)}
        states = self._engine.pack(batch, [known[id(sample.input_ids)] for sample in batch])
        for number, sample in enumerate(batch):
            if id(sample.input_ids) in self._skipped:
                states.failed[number] = self._skipped[id(sample.input_ids)]
        return states

    def prove(
        self,
        identity: Identity,
        samples: Sequence[TokenizedSample],
        last_codec: StateCodec | None,
        rope: RopeLengths,
    ) -> dict[str, float]:
        """As in `CaptureEngine`."""
        return self._engine.prove(identity, samples, last_codec, rope)

    def close(self) -> None:
        """As in `CaptureEngine`."""
        self._engine.close()


def _without_last(sample: TokenizedSample, logprobs: bool) -> Request:
    read = TokenizedSample(sample.source_row, sample.input_ids[:-1], sample.loss_mask[:-1])
    return request(read, logprobs)
