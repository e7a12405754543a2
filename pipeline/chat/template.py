"""The chat template: renders a conversation as the text that the served model will see."""

from __future__ import annotations

import datetime
import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from pipeline.chat.rows import BadRowError, Conversation, Message
from pipeline.text import one_line

_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
_GENERATION_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_TODAY = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")


@dataclass(frozen=True)
class ChatTemplate:
    """A tokenizer's chat template, or one from a file, with its arguments."""

    tokenizer: Any
    template: str | None = None
    """Used instead of the tokenizer's own."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Extra template variables, such as `enable_thinking`."""
    today: str = field(default_factory=lambda: datetime.date.today().isoformat())
    """The date that templates print, fixed so that a capture of several days has one."""

    @property
    def own(self) -> Any:
        """The template as given: text, texts by name, or None."""
        return self.template if self.template is not None else self.tokenizer.chat_template

    @property
    def prints_the_date(self) -> bool:
        return "strftime_now" in str(self.own)

    @cached_property
    def special_ids(self) -> list[int]:
        """Ids of the special tokens, such as the end of a turn, which stand for no text."""
        special = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return sorted(special | set(self.tokenizer.all_special_ids))

    @cached_property
    def special_texts(self) -> list[str]:
        """Texts of the added tokens that are special."""
        return [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]

    def source(self, tools: Any = None) -> str:
        """Return the Jinja text in use. Raises BadRowError without one."""
        if not self.own:
            raise BadRowError(
                "no chat template",
                "the target's tokenizer has no chat template: use a chat model as the target, or pass "
                "--chat-template",
            )
        source = self.template
        if source is None:
            source = self.tokenizer.get_chat_template(tools=tools)
        date = datetime.date.fromisoformat(self.today)
        return _TODAY.sub(lambda match: repr(date.strftime(match[2])), source)

    def has_marks(self, tools: Any = None) -> bool:
        """Return whether the template has generation marks around the assistant's text."""
        return _GENERATION_MARK.search(_COMMENT.sub("", self.source(tools))) is not None

    def render(self, conversation: Conversation, *, prompt: bool = False) -> str:
        """Render the conversation as text; with `prompt`, add the prompt for the next answer."""
        return self.render_marked(conversation.messages, conversation.tools, prompt=prompt)[0]

    def render_marked(
        self, messages: list[Message], tools: Any, *, prompt: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        """Render the text, and return it with the character ranges of its generation marks, if it has any.

        Raises:
            BadRowError: the template refuses the conversation.
        """
        # tokenizer.apply_chat_template calls this, but does not return the marks' character ranges.
        from transformers.utils.chat_template_utils import render_jinja_template

        source = self.source(tools)
        try:
            texts, marks = render_jinja_template(
                [messages],
                tools=tools,
                chat_template=source,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=self.has_marks(tools),
                **{**self.tokenizer.special_tokens_map, **self.arguments},
            )
        except Exception as error:  # templates raise errors of any type: jinja's, KeyError, ...
            why = one_line(error, limit=None)
            raise BadRowError(
                "template refuses", f"the chat template refuses this conversation: {why}"
            ) from None
        return texts[0], marks[0] if marks else []
