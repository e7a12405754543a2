"""Engine for transformers' `generate`, in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from capture.example import with_example
from capture.regenerate.dialogue import Dialogue
from capture.regenerate.engine import Outcome, Report, trim_unfinished
from capture.sampling import Sampling
from pipeline.errors import DataError, TargetError
from pipeline.quiet import quiet_transformers
from pipeline.target_model.find import weights_hash
from pipeline.target_model.identity import tokenizer_identity
from pipeline.target_model.load import open_target
from pipeline.target_model.options import TargetOptions

# Rows sorted by length together: enough to fill batches evenly, few enough to keep their prompts in memory.
_WINDOW = 8192


class HuggingFaceEngine:
    """Batch prompts of similar length, with a seed per batch.

    Batches and seeds depend only on the dialogues and the answers before, so that an interrupted run
    generates the same text as an uninterrupted one.
    """

    def __init__(
        self,
        load_model: Callable[[], torch.nn.Module],
        tokenizer: Any,
        sampling: Sampling,
        *,
        batch_size: int = 64,
        context_length: int | None = None,
        template_arguments: dict[str, Any] | None = None,
    ):
        """Keep the settings; the weights are loaded later.

        Args:
            load_model: called when the first batch needs the model.
            context_length: maximum tokens of prompt and answer together; None is no limit.
        """
        if not getattr(tokenizer, "chat_template", None):
            raise DataError("the target's tokenizer has no chat template: use a chat model as the target")
        self._load_model = load_model
        self._model: torch.nn.Module | None = None
        self._tokenizer = tokenizer
        self._sampling = sampling
        self._batch_size = batch_size
        self._context_length = context_length
        self._template_arguments = template_arguments or {}

    def answer(self, dialogues: Sequence[Dialogue], report: Report) -> None:
        """See `Engine.answer`. Raises TargetError if a batch does not fit the memory."""
        for start in range(0, len(dialogues), _WINDOW):
            window = dialogues[start : start + _WINDOW]
            failed: set[int] = set()
            for depth in range(max(len(dialogue.turns) for dialogue in window)):
                self._answer_depth(window, depth, start // self._batch_size, failed, report)

    def _answer_depth(
        self, window: Sequence[Dialogue], depth: int, first_batch: int, failed: set[int], report: Report
    ) -> None:
        """Answer turn `depth` of every dialogue that has one, except those in `failed`, which it extends."""
        prompts: dict[int, list[int]] = {}
        asked = {d.number: d for d in window if depth < len(d.turns) and d.number not in failed}
        for number, dialogue in asked.items():
            # Render answered turns too, so that batches stay the same.
            before = Dialogue(number, dialogue.where, dialogue.row, dialogue.answers[:depth])
            try:
                prompts[number] = self._prompt(before)
            except DataError as error:
                failed.add(number)
                report([Outcome(dialogue, failure=str(error))])
        order = sorted(prompts, key=lambda number: (len(prompts[number]), number))
        for index, batch in enumerate(_batches(order, self._batch_size), start=first_batch):
            if all(len(asked[number].answers) > depth for number in batch):
                continue
            torch.manual_seed((self._sampling.seed * 1_000_003 + depth * 10_007 + index) % 2**63)
            texts = self._generate([prompts[number] for number in batch])
            report(
                [
                    Outcome(asked[number], {"content": text})
                    for number, text in zip(batch, texts, strict=True)
                    if len(asked[number].answers) == depth
                ]
            )

    def _prompt(self, dialogue: Dialogue) -> list[int]:
        """Return the next prompt's tokens. Raises DataError if the template refuses it, or it is too long."""
        ids = dialogue.prompt_ids(self._tokenizer, self._template_arguments)
        limit, new = self._context_length, self._sampling.max_new_tokens
        if limit is not None and len(ids) + new > limit:
            raise DataError(
                f"a prompt of {len(ids)} tokens and --max-new-tokens {new} exceed the {limit} positions "
                "of the target: lower --max-new-tokens, or drop the row"
            )
        return ids

    @torch.inference_mode()
    def _generate(self, prompts: list[list[int]]) -> list[str]:
        if self._model is None:
            self._model = self._load_model()
        model, sampling = self._model, self._sampling
        pad, stops = _padding_id(model, self._tokenizer), _stop_ids(model)
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), pad)  # [B, S], left-padded
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        options: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            options = {
                "do_sample": True,
                "temperature": sampling.temperature,
                "top_k": sampling.top_k,
                "top_p": sampling.top_p,
            }
        try:
            output = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=sampling.max_new_tokens,
                pad_token_id=pad,
                **options,
            )
        except torch.OutOfMemoryError:
            raise TargetError(
                f"{len(prompts)} prompts of {width} tokens and their answers do not fit the GPU's memory: "
                "run this again with a smaller --batch-size (and without --fresh) to continue"
            ) from None
        return [self._text(tokens, stops) for tokens in output[:, width:].tolist()]

    def _text(self, tokens: list[int], stops: set[int]) -> str:
        text = self._tokenizer.decode(tokens, skip_special_tokens=True).strip()
        return text if any(token in stops for token in tokens) else trim_unfinished(text)


def context_length(config: Any) -> int | None:
    """Return the number of positions in a target's Hugging Face config; None if it names none."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _batches(order: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _stop_ids(model: torch.nn.Module) -> set[int]:
    """Return the tokens that end an answer, from the model's generation config: one id, several or none."""
    stops = model.generation_config.eos_token_id
    return set(stops) if isinstance(stops, list) else {stops} - {None}


def _padding_id(model: torch.nn.Module, tokenizer: Any) -> int:
    """Return the id that pads short prompts on the left. It is masked out, so any valid id will do."""
    for candidate in (tokenizer.pad_token_id, tokenizer.eos_token_id, *_stop_ids(model)):
        if candidate is not None:
            return candidate
    return 0


def load_engine(
    target: TargetOptions,
    sampling: Sampling,
    *,
    batch_size: int,
    template: str | None = None,
    template_arguments: dict[str, Any],
) -> tuple[HuggingFaceEngine, dict[str, Any]]:
    """Return the engine for a target, and the target's properties that decide answers.

    The weights are loaded when the first batch needs them.

    Args:
        template: replaces the tokenizer's chat template; None keeps that.

    Raises:
        TargetError: no such target, or transformers can't read it.
    """
    quiet_transformers()
    found = open_target(with_example(target))
    found.check_weights()
    tokenizer = found.tokenizer()
    if template is not None:
        tokenizer.chat_template = template
    engine = HuggingFaceEngine(
        found.model,
        tokenizer,
        sampling,
        batch_size=batch_size,
        context_length=context_length(found.config),
        template_arguments=template_arguments,
    )
    tokens = tokenizer_identity(tokenizer)
    return engine, {
        "engine": "transformers",
        "weights": weights_hash(found.directory, target),
        "dtype": str(found.dtype).removeprefix("torch."),
        "tokenizer": tokens.sha256,
        "chat template": tokens.chat_template_sha256,
    }
