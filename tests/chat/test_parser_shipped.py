"""In the format of every template that llama.cpp ships: what is written is read, however it is cut."""

from __future__ import annotations

import random

from llama_worker._chat.analysis import format_of
from llama_worker._chat.calls import write_calls
from llama_worker._chat.format import ChatFormat
from llama_worker._events import InvalidToolCall, ReplyEvent
from llama_worker._requests import ToolCall
from tests.chat.formats import TOOLS
from tests.chat.parsing import ended, parser, run, said, text_of, thought_of
from tests.chat.templates import N_TEMPLATES, shipped_templates

CALLS = [
    ToolCall(id="one", name="get_weather", arguments={"city": 'Zürich "x" <b>\n 1 & 2', "days": -3, "note": None}),
    ToolCall(id="two", name="ping", arguments={}),
    ToolCall(
        id="three",
        name="transfer",
        arguments={"to": "{Bo}", "amount": 2.5, "sure": True, "tags": ["a", "]"], "more": {"x": {"y": [None]}}},
    ),
]


def pieces(text: str, random_: random.Random) -> list[str]:
    found, at = [], 0
    while at < len(text):
        found.append(text[at : at + random_.choice((1, 2, 4, 9))])
        at += len(found[-1])
    return found


def events(format: ChatFormat, text: str) -> list[ReplyEvent]:
    """The same by the character, in pieces as tokens cut, and whole."""
    whole = run(parser(format), [text])
    assert run(parser(format), text) == whole
    for seed in range(3):
        assert run(parser(format), pieces(text, random.Random(seed))) == whole
    return whole


def test_calls_are_read_as_they_are_written() -> None:
    formats = {name: format_of(template) for name, template in shipped_templates().items()}
    with_calls = {name: format.calls for name, format in formats.items() if format.calls is not None}
    assert len(with_calls) == N_TEMPLATES
    for name, syntax in with_calls.items():
        calls = CALLS if syntax.separator is not None else CALLS[:1]
        told = events(formats[name], write_calls(syntax, calls, TOOLS))
        assert list(map(said, ended(told))) == list(map(said, calls)), name
        assert text_of(told) == "", name


def test_thoughts_and_text_are_told_apart_from_calls() -> None:
    for name, template in shipped_templates().items():
        format = format_of(template)
        assert format.calls is not None
        thought = f"{format.reasoning.open}\nhm\n{format.reasoning.close}\n\n" if format.reasoning else ""
        text = "" if format.calls.only_at_start else f"{format.text.open}Let me see.{format.text.close}"
        told = events(format, thought + text + write_calls(format.calls, CALLS[:1], TOOLS))
        assert thought_of(told) == ("hm" if thought else ""), name
        assert text_of(told) == ("Let me see." if text else ""), name
        assert list(map(said, ended(told))) == [said(CALLS[0])], name


def test_a_call_that_is_cut_off_is_never_one() -> None:
    for name, template in shipped_templates().items():
        format = format_of(template)
        assert format.calls is not None
        whole = write_calls(format.calls, CALLS[2:], TOOLS)
        complete = whole.removesuffix(format.calls.section_close)
        for at in range(0, len(complete.rstrip()), 5):
            told = ended(run(parser(format), [whole[:at]]))
            assert all(isinstance(call, InvalidToolCall) for call in told), (name, whole[:at])
