"""Runs an OutputParser over a text, cut as a test likes, and says what came of it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from itertools import count, groupby

from llama_worker._chat.format import ChatFormat
from llama_worker._chat.parser import OutputParser
from llama_worker._events import (
    InvalidToolCall,
    ReasoningDelta,
    ReplyEvent,
    TextDelta,
    ToolCallDelta,
    ToolCallEnded,
    ToolCallStarted,
)
from llama_worker._requests import ToolCall, ToolSpec
from tests.chat.formats import TOOLS

MORE = 10 if os.environ.get("LLAMA_WORKER_PROOF") else 1
"""How many times the usual number of examples a property is tried on."""


def ids() -> Callable[[], str]:
    numbers = count()
    return lambda: f"call_{next(numbers)}"


def parser(
    format: ChatFormat,
    *,
    tools: Sequence[ToolSpec] = TOOLS,
    calls: bool = True,
    in_reasoning: bool = False,
    answers: bool = False,
) -> OutputParser:
    return OutputParser(format, tools, calls=calls, in_reasoning=in_reasoning, new_id=ids(), answers=answers)


def run(parser: OutputParser, pieces: Iterable[str]) -> list[ReplyEvent]:
    """All events, deltas beside each other joined. The stream rule for calls is checked."""
    events = [event for piece in pieces for event in parser.feed(piece)] + parser.flush()
    assert_calls_are_well_formed(events)
    return joined(events)


def joined(events: Iterable[ReplyEvent]) -> list[ReplyEvent]:
    found: list[ReplyEvent] = []
    for kind, some in groupby(events, key=type):
        group = list(some)
        if kind is TextDelta:
            found.append(TextDelta("".join(event.text for event in group if isinstance(event, TextDelta))))
        elif kind is ReasoningDelta:
            found.append(ReasoningDelta("".join(event.text for event in group if isinstance(event, ReasoningDelta))))
        elif kind is ToolCallDelta:
            deltas = [event for event in group if isinstance(event, ToolCallDelta)]
            found.append(ToolCallDelta(index=deltas[0].index, arguments="".join(one.arguments for one in deltas)))
        else:
            found += group
    return found


def assert_calls_are_well_formed(events: Sequence[ReplyEvent]) -> None:
    """Started, told, ended, one after another; what was told is what the end says; ids are unique."""
    open_call: ToolCallStarted | None = None
    told, seen = "", []
    for event in events:
        match event:
            case TextDelta(text=text) | ReasoningDelta(text=text):
                assert text, "a delta must not be empty"
                assert open_call is None, "text inside a call"
            case ToolCallStarted():
                assert open_call is None
                assert event.index == len(seen)
                open_call, told = event, ""
            case ToolCallDelta(index=index, arguments=arguments):
                assert arguments, "a delta must not be empty"
                assert open_call is not None
                assert open_call.index == index
                told += arguments
            case ToolCallEnded(index=index, call=call):
                assert open_call is not None
                assert (open_call.index, open_call.id, open_call.name) == (index, call.id, call.name)
                assert not isinstance(call, InvalidToolCall) or (call.arguments == told and call.error)
                seen.append(call.id)
                open_call = None
    assert open_call is None, "a call is never ended"
    assert len(set(seen)) == len(seen)


def text_of(events: Iterable[ReplyEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, TextDelta))


def thought_of(events: Iterable[ReplyEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, ReasoningDelta))


def ended(events: Iterable[ReplyEvent]) -> list[ToolCall | InvalidToolCall]:
    return [event.call for event in events if isinstance(event, ToolCallEnded)]


def said(call: ToolCall | InvalidToolCall) -> tuple[str, object]:
    return call.name, call.arguments


def every_way(make: Callable[[], OutputParser], text: str) -> list[ReplyEvent]:
    """The events of `text`, which are the same whole, by the character, and cut in two at any place."""
    whole = run(make(), [text])
    assert run(make(), text) == whole, "by the character"
    for at in range(1, len(text)):
        assert run(make(), [text[:at], text[at:]]) == whole, f"cut at {at}"
    return whole
