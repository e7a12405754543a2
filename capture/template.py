"""The chat template: a conversation as the served model will see it, and what the assistant writes in it.

With generation marks in the template, they say it. Without, it is found by rendering the conversation's
prefixes, and verified: a span that can't be proved is refused, never guessed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from capture.rows import BadRowError, Conversation, Message

_GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_SENTINEL = "\u2063dspark\u2063"


@dataclass(frozen=True)
class Span:
    """What an assistant writes in one turn, in characters of the rendered text."""

    start: int
    """Where generation starts."""
    content_end: int
    """Behind the content, where the template's end of turn may follow."""
    end: int
    """Behind everything that the template adds to the turn, outer spaces left out."""
    whole: bool = False
    """Whether all of it is the assistant's; else it ends with the first special token behind the content."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, with the assistant's turns in order."""

    text: str
    spans: list[Span]


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template, or one from a file, with the arguments it is called with."""

    tokenizer: Any
    template: str | None = None
    """Used instead of the tokenizer's own."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Extra template variables, such as `enable_thinking`."""

    def source(self, tools: Any = None) -> str:
        """The Jinja text in use. Raises BadRowError when there is none."""
        if self.template is not None:
            return self.template
        if not self.tokenizer.chat_template:
            raise BadRowError(
                "no chat template",
                "the target's tokenizer has no chat template: use a chat model as the target, or pass "
                "--chat-template",
            )
        return self.tokenizer.get_chat_template(tools=tools)

    def _render(self, messages: list[Message], tools: Any, *, prompt: bool) -> str:
        return self._render_marked(messages, tools, prompt=prompt)[0]

    def _render_marked(
        self, messages: list[Message], tools: Any, *, prompt: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the character ranges of its generation marks (none where the template has none)."""
        # What tokenizer.apply_chat_template calls; that would not hand out the marks' characters.
        from transformers.utils.chat_template_utils import render_jinja_template

        source = self.source(tools)
        try:
            texts, marks = render_jinja_template(
                [messages],
                tools=tools,
                chat_template=source,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=_has_marks(source),
                **{**self.tokenizer.special_tokens_map, **self.arguments},
            )
        except Exception as error:  # templates raise what they like: jinja errors, KeyError, ...
            reason = " ".join(str(error).split()) or type(error).__name__
            raise BadRowError(
                "template refuses", f"the chat template refuses this conversation: {reason}"
            ) from None
        return texts[0], marks[0] if marks else []

    def render(self, conversation: Conversation, *, prompt: bool = False) -> str:
        """The conversation as text, with the prompt for the next answer if asked."""
        return self._render(conversation.messages, conversation.tools, prompt=prompt)

    def render_turns(self, conversation: Conversation) -> Rendered:
        """The conversation as text, and what the assistant writes in it.

        Raises:
            BadRowError: the template refuses the conversation, or its turns can't be told apart.
        """
        text, marks = self._render_marked(conversation.messages, conversation.tools, prompt=False)
        if _has_marks(self.source(conversation.tools)):
            return Rendered(text, [Span(start, end, end, whole=True) for start, end in marks])
        spans: list[Span] = []
        for number, message in enumerate(conversation.messages):
            if message["role"] == "assistant" and (number or _says_something(message)):
                floor = spans[-1].end if spans else 0
                spans.append(self._find_turn(conversation, text, number, floor))
        return Rendered(text, spans)

    def _find_turn(self, conversation: Conversation, text: str, number: int, floor: int) -> Span:
        """Where turn `number` stands in `text`; nothing of it lies before `floor`."""
        messages, tools = conversation.messages, conversation.tools
        visible = _visible(messages[number])
        through = self._through(messages[: number + 1], tools)
        # A conversation that the assistant opens has no prompt before it: its content is where it starts.
        before = self._render(messages[:number], tools, prompt=True) if number else ""
        if visible and visible not in through[_shared(before, through) :]:
            raise BadRowError(
                "template rewrites", f"the chat template drops or rewrites the content of message {number}"
            )
        if not text.startswith(before):
            # The prompt opens what this answer does not have (thoughts, mostly): they part where it starts.
            asked = self._render(messages[:number], tools, prompt=False)
            shared = _shared(before, text)
            at = text.find(visible, len(asked)) if visible else shared
            start = min(shared, at) if text.startswith(asked) and shared > len(asked) and at >= 0 else None
        else:
            start = len(before) if number else max(text.find(visible), 0)
        if start is not None and start >= floor:
            # Behind the start, the turn is as it is without what follows, but for thoughts in front that
            # some templates show in the last turn only.
            own = through[_shared(before, through) if number else start :]
            if not text.startswith(own, start):
                own = _longest_prefix_that_ends(text[start : start + len(own)], own)
            if own.strip() and visible in own:
                return _span(own, start, visible, whole=bool(messages[number].get("tool_calls")))
        found = self._by_replacing(conversation, text, number, floor, through)
        if found is None:
            raise BadRowError(
                "template rewrites",
                f"the chat template renders message {number} differently once more messages follow, "
                "so its tokens can't be told from the text; use a template with {% generation %} marks",
            )
        return found

    def _through(self, messages: list[Message], tools: Any) -> str:
        """The conversation up to its last message, without what the template closes a conversation with."""
        through = self._render(messages, tools, prompt=False)
        try:
            agreed = _shared(through, self._render(messages, tools, prompt=True))
        except BadRowError:  # no template has to take a prompt after an answer
            return through
        if agreed == len(through):
            return through
        starts = {token: through.rfind(token, 0, agreed) for token in self._special_texts()}
        return through[: max((at + len(token) for token, at in starts.items() if at >= 0), default=agreed)]

    def _special_texts(self) -> list[str]:
        return [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]

    def _by_replacing(
        self, conversation: Conversation, text: str, number: int, floor: int, through: str
    ) -> Span | None:
        """The content alone, found by what changes when it is another one; for prompts that get rewritten."""
        messages = list(conversation.messages)
        visible = _visible(messages[number])
        if not visible:
            return None
        messages[number] = {**messages[number], "content": _SENTINEL}
        head, sentinel, tail = self._render(messages, conversation.tools, prompt=False).partition(_SENTINEL)
        if not sentinel or not text.startswith(head) or not text.endswith(tail) or len(head) < floor:
            return None
        start, end = len(head), len(text) - len(tail)
        if text[start:end].strip() != visible:
            return None
        # What the template puts behind the content when nothing follows: the end of turn.
        closing = through[through.rfind(visible) + len(visible) :].rstrip()
        return Span(start, end, end + len(closing)) if text.startswith(closing, end) else None


def _has_marks(template: str) -> bool:
    return _GENERATION_MARK.search(template) is not None


def _shared(a: str, b: str) -> int:
    """How many characters two texts have in common at their start."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _says_something(message: Message) -> bool:
    return bool(message["content"].strip() or message.get("tool_calls"))


def _visible(message: Message) -> str:
    """What every template shows of a message's content: thoughts and outer spaces may be left out."""
    return message["content"].rpartition("</think>")[2].strip()


def _span(own: str, start: int, visible: str, *, whole: bool) -> Span:
    """The span of a turn that reads `own` from `start` on."""
    content_end = start + (own.rfind(visible) + len(visible) if visible else 0)
    return Span(start, content_end, start + len(own.rstrip()), whole)


def _longest_prefix_that_ends(text: str, ending: str) -> str:
    """The longest prefix of `text` that `ending` ends with (Knuth, Morris and Pratt's failure function)."""
    joined = [*text, None, *ending]
    borders = [0] * len(joined)
    for i in range(1, len(joined)):
        length = borders[i - 1]
        while length and joined[i] != joined[length]:
            length = borders[length - 1]
        borders[i] = length + (joined[i] == joined[length])
    return text[: borders[-1]]
