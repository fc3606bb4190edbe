"""A ChatFormat as `describe` shows it: labels and values."""

from __future__ import annotations

from llama_worker._chat.format import CallSyntax, ChatFormat, Part, Slot, Tagged

_ORIGINS = {
    "derived": "read off what the template renders",
    "data": "known to this package",
    "generic": "the template knows no tools; they are described in the system message",
}


def shown_format(format: ChatFormat) -> list[tuple[str, str]]:
    """What a user may want to know of it. Blanks that do not show are escaped; NAME and the like vary."""
    rows = [("chat format", f"{format.origin} ({_ORIGINS[format.origin]})")]
    if format.calls is not None:
        rows += _shown_calls(format.calls)
    else:
        rows.append(("tool calls", "none: this template cannot be given tools"))
    reasoning = format.reasoning
    rows.append(("thoughts", "none" if reasoning is None else f"{_text(reasoning.open)} … {_text(reasoning.close)}"))
    if reasoning is not None:
        rows.append(("of past turns", "replayed" if format.replays_reasoning else "dropped"))
    if format.thinking_switch is not None:
        rows.append(("turned on and off", f"by enable_thinking (its variable: {format.thinking_switch})"))
    return rows


def _shown_calls(calls: CallSyntax) -> list[tuple[str, str]]:
    where = ", where the reply begins" if calls.only_at_start else ""
    where += f", or behind a text and {_text(calls.behind_text)}" if calls.behind_text else ""
    rows = [("tool calls", "".join(map(_part, calls.call))), ("begin with", _text(calls.trigger) + where)]
    if calls.section_open or calls.section_close:
        rows.append(("around them", f"{_text(calls.section_open)} … {_text(calls.section_close)}"))
    rows.append(("arguments", _arguments(calls.arguments)))
    several = "one a turn" if calls.separator is None else f"any number, {_text(calls.separator) or 'nothing'} between"
    rows.append(("parallel calls", several))
    return rows


def _arguments(arguments: str | Tagged) -> str:
    if isinstance(arguments, Tagged):
        first = f"{arguments.key_open}KEY{arguments.value_open}VALUE{arguments.value_close}"
        return f"each by itself: {_text(first)}"
    return "a JSON object" if arguments == "json" else "a JSON object as the text of a JSON string"


def _part(part: Part) -> str:
    return part.name if isinstance(part, Slot) else _text(part)


def _text(text: str) -> str:
    return text.encode("unicode_escape").decode() if not text.isprintable() else text
