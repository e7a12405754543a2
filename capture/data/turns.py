"""Where the assistant's turns stand in a rendered conversation: which characters it writes itself.

With generation marks in the template, they say it. Without, a turn's content is found by what changes in
the text when the content is another one, its start by the prompt that asks for it, and its end by what the
template puts behind it when nothing follows. A turn that can't be proved is refused, never guessed.
"""

from __future__ import annotations

from dataclasses import dataclass

from pipeline.chat.rows import BadRowError, Conversation, Message
from pipeline.chat.template import ChatTemplate

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


def render_turns(template: ChatTemplate, conversation: Conversation) -> Rendered:
    """The conversation as text, and what the assistant writes in it.

    Raises:
        BadRowError: the template refuses the conversation, or its turns can't be told apart.
    """
    finder = _Finder(template, conversation)
    if template.has_marks(conversation.tools):
        text, marks = template.render_marked(conversation.messages, conversation.tools, prompt=False)
        return Rendered(text, [finder.marked(start, end) for start, end in marks])
    spans: list[Span] = []
    for number, message in enumerate(conversation.messages):
        if message["role"] == "assistant" and (number or _says_something(message)):
            spans.append(finder.find(number, spans[-1].end if spans else 0))
    return Rendered(finder.text, spans)


class _Finder:
    """One conversation; its beginnings are rendered once each."""

    def __init__(self, template: ChatTemplate, conversation: Conversation):
        self._template = template
        self._messages, self._tools = conversation.messages, conversation.tools
        self._beginnings: dict[tuple[int, bool], str] = {}
        self.text = self._beginning(len(self._messages))

    def _beginning(self, count: int, *, prompt: bool = False) -> str:
        """The first `count` messages, rendered."""
        key = (count, prompt)
        if key not in self._beginnings:
            messages = self._messages[:count]
            self._beginnings[key] = self._template.render_marked(messages, self._tools, prompt=prompt)[0]
        return self._beginnings[key]

    def marked(self, start: int, end: int) -> Span:
        """A mark's range, without a header at its start and line feeds behind its end of turn.

        Some templates (SmolLM3's) mark the whole message; the model is given its header.
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
        """Where assistant turn `number` stands; nothing of it lies before `floor`."""
        message = self._messages[number]
        visible = _visible(message)
        span = None
        if visible and not message.get("tool_calls"):
            span = self._by_replacing(number, floor, visible)
        if span is None:
            span = self._by_beginnings(number, floor, visible)
        if span is None and visible and visible not in self._beginning(number + 1):
            raise BadRowError(
                "template rewrites", f"the chat template drops or rewrites the content of message {number}"
            )
        if span is None:
            raise BadRowError(
                "template rewrites",
                f"the chat template renders message {number} differently once more messages follow, "
                "so its tokens can't be told from the text; use a template with {% generation %} marks",
            )
        return span

    def _content(self, number: int, count: int, visible: str) -> tuple[int, int] | None:
        """Where the content of message `number` stands in the first `count` messages as text."""
        rendered = self._beginning(count)
        sentinel = _SENTINEL
        while sentinel in rendered:
            sentinel += _SENTINEL
        before, _, behind = self._messages[number]["content"].rpartition(visible)
        messages = list(self._messages[:count])
        messages[number] = {**messages[number], "content": before + sentinel + behind}
        other = self._template.render_marked(messages, self._tools, prompt=False)[0]
        head, found, tail = other.partition(sentinel)
        start, end = len(head), len(rendered) - len(tail)
        proved = found and rendered.startswith(head) and rendered.endswith(tail)
        return (start, end) if proved and rendered[start:end] == visible else None

    def _by_replacing(self, number: int, floor: int, visible: str) -> Span | None:
        """A turn whose content the template shows as it is."""
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
            # Another end of turn where more follows (gpt-oss): the special token right behind the content.
            here_too = (t for t in self._template.special_texts if self.text.startswith(t, end))
            closing = next(here_too, "") if closing.startswith(tuple(self._template.special_texts)) else ""
            if not closing:
                return None
        return Span(start, end, end + len(closing))

    def _start(self, number: int, content: int) -> int:
        """Where the generation of a turn starts whose content starts at `content`."""
        before = self._beginning(number, prompt=True)
        if self.text.startswith(before) and len(before) <= content:
            return len(before)
        # The prompt opens what this answer does not have (thoughts, mostly), or is rewritten later. Only
        # spaces in front of the content can be told to be the answer's.
        fork = min(_shared(before, self.text), content)
        bare = self._beginning(number)
        between = self.text[fork:content]
        return fork if self.text.startswith(bare) and fork > len(bare) and between.isspace() else content

    def _by_beginnings(self, number: int, floor: int, visible: str) -> Span | None:
        """A turn that is more, or less, than its content: tool calls, or no words at all."""
        if not number:
            return None
        bare, before = self._beginning(number), self._beginning(number, prompt=True)
        through = self._through(number, len(before))
        thoughts = before.find("<think>", len(bare))

        def answer_start(text: str) -> int:
            """Behind the prompt, or where the two part: a prompt may open thoughts that an answer has not."""
            if text.startswith(before):
                return len(before)
            return min(_shared(before, text), thoughts if thoughts >= 0 else len(before))

        start, own = answer_start(self.text), through[answer_start(through) :]
        parted = start < len(before)
        if start < floor or (parted and not (self.text.startswith(bare) and start > len(bare))):
            return None
        if not self.text.startswith(own, start):
            # Thoughts in front that some templates show in the last turn only.
            own = _longest_prefix_that_ends(self.text[start : start + len(own)], own)
        if not own.strip() or visible not in own:
            return None
        calls = bool(self._messages[number].get("tool_calls"))
        # Thoughts and nothing else are content too, where the template shows them.
        shown = visible or self._messages[number]["content"].strip()
        content_end = start + (own.rfind(shown) + len(shown) if shown and shown in own else 0)
        return Span(start, content_end, start + len(own.rstrip()), whole=calls)

    def _through(self, number: int, content_end: int) -> str:
        """The text up to message `number`, without what the template closes a conversation with.

        Nothing before `content_end` is taken for such a closing.
        """
        through = self._beginning(number + 1)
        try:
            agreed = _shared(through, self._beginning(number + 1, prompt=True))
        except BadRowError:  # no template has to take a prompt after an answer
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
    """What every template shows of a message's content: thoughts and outer spaces may be left out."""
    return message["content"].rpartition("</think>")[2].strip()


def _shared(a: str, b: str) -> int:
    """How many characters two texts have in common at their start."""
    low, high = 0, min(len(a), len(b))
    while low < high:  # by halving: slices compare at memory speed, characters one by one do not
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low


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
