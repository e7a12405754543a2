"""Find the characters that the assistant writes itself in a rendered conversation.

Generation marks in the template mark them. Without marks, the content of a turn is found by replacing it and
comparing the texts, its start by rendering the prompt before it, and its end by rendering the conversation
that ends with it. A turn whose position can't be proved is refused, never guessed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pipeline.chat.rows import BadRowError, Conversation, Message
from pipeline.chat.template import ChatTemplate

_SENTINEL = "\u2063dspark\u2063"


@dataclass(frozen=True)
class Span:
    """Text of an assistant in one turn, as character positions in the rendered conversation."""

    start: int
    """Start of the generated text."""
    content_end: int
    """End of the content. The template's end of turn may follow."""
    end: int
    """End of everything that the template adds to the turn, without outer spaces."""
    whole: bool = False
    """True: all of it is the assistant's. False: that ends with the first special token after the content."""
    message: int | None = None
    """Number of its message; None for a generation mark, which names none."""


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, with the assistant's turns in order."""

    text: str
    spans: list[Span]


def render_turns(template: ChatTemplate, conversation: Conversation) -> Rendered:
    """Render the conversation and find the spans that the assistant writes.

    Raises:
        BadRowError: the template refuses the conversation, or the position of a turn can't be proved.
    """
    finder = _Finder(template, conversation)
    for number, message in enumerate(conversation.messages):
        if message.get("tool_calls") and not finder.renders_calls(number):
            raise BadRowError(
                "template drops tool calls",
                f"the chat template drops the tool calls of message {number}, so that an empty turn would be "
                "learned: use a template with tools, or take the row out",
            )
    if template.has_marks(conversation.tools):
        text, marks = template.render_marked(conversation.messages, conversation.tools, prompt=False)
        return Rendered(text, [finder.marked(start, end) for start, end in marks])
    spans: list[Span] = []
    for number, message in enumerate(conversation.messages):
        if message["role"] == "assistant" and (number or _says_something(message)):
            span = finder.find(number, spans[-1].end if spans else 0)
            spans.append(replace(span, message=number))
    return Rendered(finder.text, spans)


def unmasked(template: ChatTemplate, conversation: Conversation, rendered: Rendered) -> list[Span]:
    """Return the spans of the messages that the row does not leave out of the loss.

    Raises:
        BadRowError: it can't be proved which message a generation mark belongs to.
    """
    owners = [span.message for span in rendered.spans]
    if None in owners:
        owners = _owners_of_marks(template, conversation, rendered)
    return [s for s, owner in zip(rendered.spans, owners, strict=True) if owner not in conversation.masked]


def _owners_of_marks(
    template: ChatTemplate, conversation: Conversation, rendered: Rendered
) -> list[int | None]:
    """Return the message number of each generation mark."""
    messages, tools = conversation.messages, conversation.tools
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    starts = []
    for number in answers:
        before = template.render_marked(messages[:number], tools, prompt=False)[0] if number else ""
        starts.append(len(before) if rendered.text.startswith(before) else None)
    if None not in starts:  # a message can have several marks, or none
        return [
            max((n for n, at in zip(answers, starts, strict=True) if at <= span.start), default=None)
            for span in rendered.spans
        ]
    if len(answers) == len(rendered.spans):
        return list(answers)
    raise BadRowError(
        "template rewrites",
        "the chat template's generation marks can't be matched with the messages, so that the masked ones "
        "among them are unknown: use another template, or take the row out",
    )


class _Finder:
    """Find turns in one conversation. Each prefix of its messages is rendered once."""

    def __init__(self, template: ChatTemplate, conversation: Conversation):
        self._template = template
        self._messages, self._tools = conversation.messages, conversation.tools
        self._beginnings: dict[tuple[int, bool], str] = {}
        self.text = self._beginning(len(self._messages))

    def _beginning(self, count: int, *, prompt: bool = False) -> str:
        """Render the first `count` messages, with the prompt for the next answer if asked."""
        key = (count, prompt)
        if key not in self._beginnings:
            messages = self._messages[:count]
            self._beginnings[key] = self._template.render_marked(messages, self._tools, prompt=prompt)[0]
        return self._beginnings[key]

    def renders_calls(self, number: int) -> bool:
        """Return whether the text depends on the tool calls of a message."""
        message = {key: value for key, value in self._messages[number].items() if key != "tool_calls"}
        messages = [*self._messages[:number], message, *self._messages[number + 1 :]]
        try:
            return self._template.render_marked(messages, self._tools, prompt=False)[0] != self.text
        except BadRowError:  # a template may demand a call before a tool's message
            return True

    def marked(self, start: int, end: int) -> Span:
        """Return a mark's span, without the turn's header and the spaces after its end of turn.

        Some templates (SmolLM3's) mark the whole message, but the header is part of the prompt.
        """
        asked, prompted = self._beginning(1), self._beginning(1, prompt=True)
        header = prompted[len(asked) :] if prompted.startswith(asked) else ""
        if header and self.text.startswith(header, start) and start + len(header) < end:
            start += len(header)
        bare = self.text[start:end].rstrip()
        if any(bare.endswith(token) for token in self._template.special_texts):
            end = start + len(bare)
        return Span(start, end, end, whole=True)

    def find(self, number: int, floor: int) -> Span:
        """Return the span of assistant turn `number`, which starts at `floor` or later.

        Raises:
            BadRowError: its position can't be proved.
        """
        message = self._messages[number]
        visible = _visible(message)
        span = None
        if visible and not message.get("tool_calls"):
            span = self._by_replacing(number, floor, visible)
        if span is None:
            span = self._by_beginnings(number, floor, visible)
        if span is None and visible and visible not in self._beginning(number + 1):
            raise BadRowError(
                "template rewrites",
                f"the chat template drops or rewrites the content of message {number}: use another template",
            )
        if span is None:
            raise BadRowError(
                "template rewrites",
                f"the chat template renders message {number} differently when more messages follow, so its "
                "tokens can't be found in the text: use a template with {% generation %} marks",
            )
        return span

    def _content(self, number: int, count: int, visible: str) -> tuple[int, int] | None:
        """Find the content of message `number` in the rendered first `count` messages: start and end."""
        rendered = self._beginning(count)
        sentinel = _SENTINEL
        while sentinel in rendered:
            sentinel += _SENTINEL
        before, _, after = self._messages[number]["content"].rpartition(visible)
        messages = list(self._messages[:count])
        messages[number] = {**messages[number], "content": before + sentinel + after}
        other = self._template.render_marked(messages, self._tools, prompt=False)[0]
        head, found, tail = other.partition(sentinel)
        start, end = len(head), len(rendered) - len(tail)
        proved = found and rendered.startswith(head) and rendered.endswith(tail)
        return (start, end) if proved and rendered[start:end] == visible else None

    def _by_replacing(self, number: int, floor: int, visible: str) -> Span | None:
        """Find a turn whose content the template renders unchanged."""
        here = self._content(number, len(self._messages), visible)
        alone = self._content(number, number + 1, visible)
        if here is None or alone is None:
            return None
        start, end = here
        if number:
            start = self._start(number, start)
        if start < floor:
            return None
        closing = self._through(number, alone[1])[alone[1] :].rstrip()
        if not self.text.startswith(closing, end):
            # Another end of turn if messages follow (gpt-oss): the special token right after the content.
            here_too = (t for t in self._template.special_texts if self.text.startswith(t, end))
            closing = next(here_too, "") if closing.startswith(tuple(self._template.special_texts)) else ""
            if not closing:
                return None
        return Span(start, end, end + len(closing))

    def _start(self, number: int, content: int) -> int:
        """Return the start of generation of the turn whose content starts at `content`."""
        before = self._beginning(number, prompt=True)
        if self.text.startswith(before) and len(before) <= content:
            return len(before)
        # The prompt opens text that this answer lacks (usually reasoning), or the template rewrites it later.
        # Only spaces before the content are provably the answer's.
        fork = min(_shared(before, self.text), content)
        bare = self._beginning(number)
        between = self.text[fork:content]
        return fork if self.text.startswith(bare) and fork > len(bare) and between.isspace() else content

    def _by_beginnings(self, number: int, floor: int, visible: str) -> Span | None:
        """Find a turn that has more than its content, such as tool calls, or no visible content."""
        if not number:
            return None
        bare, before = self._beginning(number), self._beginning(number, prompt=True)
        through = self._through(number, len(before))
        reasoning = before.find("<think>", len(bare))

        def answer_start(text: str) -> int:
            """Return the prompt's end, or where the text departs from it: a prompt may open reasoning."""
            if text.startswith(before):
                return len(before)
            return min(_shared(before, text), reasoning if reasoning >= 0 else len(before))

        start, own = answer_start(self.text), through[answer_start(through) :]
        parted = start < len(before)
        if start < floor or (parted and not (self.text.startswith(bare) and start > len(bare))):
            return None
        if not self.text.startswith(own, start):
            # Some templates show the reasoning before an answer in the last turn only.
            own = _longest_prefix_that_ends(self.text[start : start + len(own)], own)
        if not own.strip() or visible not in own:
            return None
        calls = bool(self._messages[number].get("tool_calls"))
        # Reasoning alone is content too, if the template shows it.
        shown = visible or self._messages[number]["content"].strip()
        content_end = start + (own.rfind(shown) + len(shown) if shown and shown in own else 0)
        return Span(start, content_end, start + len(own.rstrip()), whole=calls)

    def _through(self, number: int, content_end: int) -> str:
        """Render through message `number`, without the template's end of the conversation.

        Text before `content_end` is never taken for that end.
        """
        through = self._beginning(number + 1)
        try:
            agreed = _shared(through, self._beginning(number + 1, prompt=True))
        except BadRowError:  # a template may refuse a prompt after an answer
            return through
        if agreed == len(through):
            return through
        ends = [
            at + len(token)
            for token in self._template.special_texts
            if (at := through.rfind(token, content_end, agreed)) >= 0
        ]
        return through[: max(ends)] if ends else through


def _says_something(message: Message) -> bool:
    return bool(message["content"].strip() or message.get("tool_calls"))


def _visible(message: Message) -> str:
    """Return the content that every template renders: without reasoning and outer spaces."""
    return message["content"].rpartition("</think>")[2].strip()


def _shared(a: str, b: str) -> int:
    """Return the length of the common prefix of two texts."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # bisection: comparing slices is faster than comparing single characters
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


def _longest_prefix_that_ends(text: str, ending: str) -> str:
    """Return the longest prefix of `text` that `ending` ends with (Knuth-Morris-Pratt failure function)."""
    joined = [*text, None, *ending]
    borders = [0] * len(joined)
    for i in range(1, len(joined)):
        length = borders[i - 1]
        while length and joined[i] != joined[length]:
            length = borders[length - 1]
        borders[i] = length + (joined[i] == joined[length])
    return text[: borders[-1]]
