"""format_of: how a chat template writes thoughts and calls, read off what it renders."""

from __future__ import annotations

from dataclasses import replace

from llama_worker._chat.format import CallSyntax, ChatFormat, Tagged
from llama_worker._chat.format_data import with_data
from llama_worker._chat.generic import GENERIC_CALLS
from llama_worker._chat.probe import THOUGHT, Probe
from llama_worker._chat.reading import read_calls
from llama_worker._chat.template import ChatTemplate
from llama_worker._chat.thoughts import read_reasoning, read_text, read_turn

_MOST_KNOWN = 256
_known: dict[str, ChatFormat] = {}


def format_of(template: ChatTemplate) -> ChatFormat:
    """What `template` writes: derived from its renderings, with what `format_data.py` knows better; generic where
    it writes no calls. Cached by the template's digest.

    Any thread; blocks for some milliseconds the first time. Never raises for what a template does.
    """
    known = _known.get(template.digest)
    if known is None:
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        known = _known[template.digest] = analyse(template)
    return known


def analyse(template: ChatTemplate) -> ChatFormat:
    """As `format_of`, without a cache."""
    found = with_data(_derived(template), template.source)
    if found.calls is not None:
        return found
    return replace(found, origin="generic", calls=GENERIC_CALLS, takes_tools=False)


def _derived(template: ChatTemplate) -> ChatFormat:
    probe = Probe(template)
    if not probe.prompt and not probe.content:  # it renders nothing, perhaps after a long time
        return ChatFormat(digest=template.digest, origin="derived")
    reasoning = read_reasoning(probe)
    text = read_text(probe, reasoning)
    calls = read_calls(probe, reasoning, text)
    return ChatFormat(
        digest=template.digest,
        origin="derived",
        calls=calls,
        reasoning=reasoning,
        text=text,
        takes_tools=probe.takes_tools,
        takes_calls=probe.takes_calls,
        arguments_as_text=probe.arguments_as_text,
        values_as_text=calls is not None and _is_bare(calls) and probe.in_pythons_way,
        replays_reasoning=THOUGHT in probe.thought or THOUGHT in probe.thought_and_call,
        thinking_switch=probe.switch,
        turn_open=read_turn(probe, reasoning),
    )


def _is_bare(calls: CallSyntax) -> bool:
    """Whether strings stand as they are, between the same as all other values."""
    tags = calls.arguments
    if not isinstance(tags, Tagged) or tags.json_strings or tags.type_close is not None:
        return False
    return (tags.string_open, tags.string_close) == (tags.value_open, tags.value_close)
