"""Read the rows of the data as dialogues."""

from __future__ import annotations

from typing import Any

from capture.console import note
from capture.data.sources import RawRow, form_of, open_sources
from capture.options import ReadingOptions
from capture.regenerate.dialogue import Dialogue, Message, with_arguments
from pipeline.chat.messages import parsed_json
from pipeline.chat.rows import BadRowError, Conversation, detect_form, form_keys, parse_line, read_row
from pipeline.errors import DataError, UsageError

# Bad rows that are printed.
_PRINTED = 5


def read_dialogues(options: ReadingOptions) -> list[Dialogue]:
    """Read the first `--num-samples` conversations of the data as dialogues without answers.

    Raises:
        DataError: a row is no conversation (unless they are skipped), or no row has a turn to answer.
        UsageError: no data is named.
    """
    if not options.data:
        raise UsageError("nothing to answer: name the conversations with --data")
    chosen = None if options.format == "auto" else options.format
    dialogues: list[Dialogue] = []
    bad = 0
    for source in open_sources(options.data, split=options.split, subset=options.subset):
        form = chosen or form_of(source)
        for number, raw in source.rows():
            if len(dialogues) == options.num_samples:
                break
            try:
                row = conversation_row(raw, form)
            except BadRowError as problem:
                if options.bad_rows == "fail":
                    raise DataError(f"{source.at(number)}: {problem}") from None
                bad += 1
                if bad <= _PRINTED:
                    note(f"skipped {source.at(number)}: {problem}")
            else:
                dialogues.append(Dialogue(len(dialogues), source.at(number), row))
    if bad > _PRINTED:
        note(f"skipped {bad - _PRINTED:,} more bad rows")
    if not any(dialogue.turns for dialogue in dialogues):
        raise DataError(
            f"{', '.join(options.data)}: no row has an assistant turn to answer ({len(dialogues):,} "
            "conversations read): expected turns of the assistant that call no tools"
        )
    return dialogues


def conversation_row(raw: RawRow, form: str | None = None) -> dict[str, Any]:
    """Return a row in OpenAI's form, with its other keys kept. A row of that form is returned unchanged.

    Raises:
        BadRowError: the row is no conversation.
    """
    row = parse_line(raw) if isinstance(raw, bytes) else raw
    content = read_row(row, form)
    if not isinstance(content, Conversation):
        raise BadRowError("no conversation", "expected a conversation, got text or tokens")
    form = form or detect_form(row) or "messages"
    read = [m | {"weight": 0} if i in content.masked else m for i, m in enumerate(content.messages)]
    messages = row.get("messages") if form == "messages" else None
    if isinstance(messages, list) and len(messages) == len(read):
        pairs = zip(messages, read, strict=True)
        return {**row, "messages": [_unchanged(message, clean) for message, clean in pairs]}
    row = {key: value for key, value in row.items() if key not in form_keys(form)}
    return {**row, "messages": read} | ({"tools": content.tools} if content.tools else {})


def _unchanged(message: Any, clean: Message) -> Message:
    """Return a message as it was, or as it is read if a chat template would not understand it so."""
    plain = isinstance(message, dict) and isinstance(message.get("role"), str)
    if not plain or not isinstance(message.get("content"), str):
        return clean
    calls = message.get("tool_calls") or None
    if isinstance(calls, list):
        calls = with_arguments([message], parsed_json)[0]["tool_calls"]
    return message if calls == clean.get("tool_calls") else clean
