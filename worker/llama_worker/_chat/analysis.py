"""format_of: how a chat template writes thoughts and calls, read off what it renders."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Literal

from llama_worker._chat.calls import write_arguments
from llama_worker._chat.format import CallSyntax, ChatFormat, Tagged
from llama_worker._chat.format_data import with_data
from llama_worker._chat.generic import GENERIC_CALLS
from llama_worker._chat.probe import NESTED, THOUGHT, Probe
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
    given = _replayed(probe, calls)
    return ChatFormat(
        digest=template.digest,
        origin="derived",
        calls=calls,
        reasoning=reasoning,
        text=text,
        takes_tools=probe.takes_tools,
        takes_calls=probe.takes_calls,
        arguments_as_text=probe.arguments_as_text,
        values_as_text=given == "values",
        arguments_as_written=given == "written",
        replays_reasoning=THOUGHT in probe.thought or THOUGHT in probe.thought_and_call,
        thinking_switch=probe.switch,
        turn_open=read_turn(probe, reasoning),
    )


def _replayed(probe: Probe, calls: CallSyntax | None) -> Literal["plain", "values", "written"]:
    """How tagged arguments must be given so that past calls come out as the model is held to write them: as they are;
    what is no string as JSON text; or all of them as the text that the model writes. Plain where nothing helps."""
    if calls is None or not isinstance(calls.arguments, Tagged) or calls.arguments.type_close is not None:
        return "plain"
    wanted = write_arguments(calls, NESTED, None)
    if wanted in probe.replayed(NESTED):
        return "plain"
    as_text = {key: json.dumps(value) for key, value in NESTED.items()}
    if calls.arguments.is_bare and wanted in probe.replayed(as_text):
        return "values"
    return "written" if wanted in probe.replayed(wanted) else "plain"
