"""For any text, cut anyhow, in any format: the same events; for any calls: what is written is read."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_worker._chat.calls import write_calls
from llama_worker._chat.format import CallSyntax, ChatFormat, Part, ReasoningSyntax, Slot, Tagged, TextSyntax
from llama_worker._events import InvalidToolCall, ReasoningDelta, TextDelta
from llama_worker._requests import ToolCall, ToolSpec
from tests.chat.formats import SYNTAXES, TOOLS, format_with
from tests.chat.parsing import MORE, ended, parser, run, said, text_of

WORDS = ["get_weather", "transfer", "ping", "city", "days", "note", "to", "tags", "string", "number"]
VALUES = ["{}", '{"city": "x"}', "3", "true", "null", '"', "\\", "\\n", "\\u00fc", "\\ud83d", "\\ude00", "é", "😀"]
SIGNS = [" ", "\n", "\t ", "{", "}", "[", "]", ",", ":", "<", ">", "/", "<think>", "</think>", "hello"]


def pieces_of(format: ChatFormat) -> list[str]:
    """What a text that resembles a call of this format is made of."""
    syntax = format.calls
    assert syntax is not None
    texts = [part for part in syntax.call if isinstance(part, str)]
    texts += [syntax.section_open, syntax.section_close, syntax.separator or "", syntax.trigger]
    if isinstance(tagged := syntax.arguments, Tagged):
        texts += [tagged.key_open, tagged.string_open, tagged.string_close, tagged.value_open, tagged.value_close]
        texts += [tagged.between, tagged.key_again or "", tagged.type_close or ""]
    texts += [format.text.open, format.text.close]
    halves = [half for text in texts for half in (text[: len(text) // 2], text[len(text) // 2 :])]
    return sorted({text for text in [*texts, *halves, *WORDS, *VALUES, *SIGNS] if text})


@st.composite
def any_syntax(draw: st.DrawFn) -> CallSyntax:
    """Of two letters and a blank, so that markers overlap and contain each other."""
    letters = st.text("ab ", max_size=3)
    some = st.text("ab", min_size=1, max_size=3)
    slots = draw(st.permutations([Slot.NAME, Slot.ARGUMENTS, *draw(st.lists(st.sampled_from(Slot), max_size=2))]))
    call: list[Part] = [draw(some | st.just(""))]
    for slot in slots:
        call += [slot, draw(letters)]
    section_open = draw(letters).lstrip()
    opening = section_open + str(call[0])
    trigger = opening[: draw(st.integers(0, len(opening)))]
    tagged = st.builds(
        Tagged,
        key_open=letters,
        string_open=letters,
        string_close=some,
        value_open=letters,
        value_close=letters,
        between=letters,
        key_again=st.none() | letters,
        type_close=st.none() | letters,
        json_strings=st.booleans(),
    )
    return CallSyntax(
        call=tuple(call),
        arguments=draw(st.sampled_from(["json", "json_string"]) | tagged),
        section_open=section_open,
        separator=draw(st.none() | letters),
        section_close=draw(letters),
        trigger=trigger,
        only_at_start=not trigger or draw(st.booleans()),
    )


@st.composite
def any_format(draw: st.DrawFn) -> ChatFormat:
    marker = st.text("ab", max_size=2)
    return ChatFormat(
        digest="random",
        origin="data",
        calls=draw(any_syntax()),
        reasoning=draw(st.none() | st.builds(ReasoningSyntax, open=marker, close=marker)),
        text=draw(st.builds(TextSyntax, open=marker, close=marker)),
    )


FORMATS = st.one_of(
    st.sampled_from(list(SYNTAXES.values())).map(format_with),
    st.sampled_from(list(SYNTAXES.values())).map(
        lambda syntax: format_with(syntax, text=TextSyntax(open="<|text|>", close="<|end|>"))
    ),
    any_format(),
)
LETTER_TOOLS = (*TOOLS, ToolSpec(name="a"), ToolSpec(name="b a", parameters={"properties": {"b": {"type": "string"}}}))


@st.composite
def any_text(draw: st.DrawFn, format: ChatFormat) -> str:
    """Pieces of the format at random, or calls as they are written, spoilt at some places."""
    pieces = st.sampled_from(pieces_of(format)) | st.text("ab \n", max_size=3)
    if draw(st.booleans()) or format.calls is None:
        return "".join(draw(st.lists(pieces, max_size=25)))
    text = draw(pieces) + write_calls(format.calls, draw(st.lists(CALLS, min_size=1, max_size=3)), LETTER_TOOLS)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.sampled_from(["", draw(pieces)])) + text[at + draw(st.integers(0, 3)) :]
    return text[: draw(st.integers(0, len(text)))] if draw(st.booleans()) else text


NAMES = st.sampled_from([tool.name for tool in LETTER_TOOLS] + ["rm"])
STRINGS = st.text(max_size=12) | st.text("<>/{}[]\"'\\ \n:,|nul", max_size=12)
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | STRINGS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(STRINGS, inner, max_size=3),
    max_leaves=8,
)
ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "city": STRINGS,
        "days": st.integers(-(10**20), 10**20),
        "note": st.none() | STRINGS,
        "to": STRINGS,
        "amount": st.floats(allow_nan=False, allow_infinity=False),
        "sure": st.booleans(),
        "tags": st.lists(STRINGS, max_size=3),
        "more": st.dictionaries(STRINGS, JSON, max_size=3),
        "anything": JSON,
    },
)
CALLS = st.builds(ToolCall, id=st.text(max_size=9), name=NAMES, arguments=ARGUMENTS)


def cut(text: str, places: list[int]) -> list[str]:
    borders = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[start:stop] for start, stop in pairwise(borders)]


@settings(deadline=None, max_examples=300 * MORE)
@given(st.data())
def test_any_cutting_gives_the_same_events(data: st.DataObject) -> None:
    format = data.draw(FORMATS)
    text = data.draw(any_text(format))
    thinking, calls = data.draw(st.booleans()), data.draw(st.sampled_from([True, True, True, False]))
    places = data.draw(st.lists(st.integers(0, 2000), max_size=12))

    def events(pieces: list[str]) -> list[Any]:
        return run(parser(format, tools=LETTER_TOOLS, calls=calls, in_reasoning=thinking), pieces)

    whole = events([text])
    assert events(cut(text, places)) == whole
    assert events(list(text)) == whole


@settings(deadline=None, max_examples=300 * MORE)
@given(st.data())
def test_nothing_but_blanks_and_markers_is_lost(data: st.DataObject) -> None:
    """Without calls: what was fed is what was told, but for the tags and the blanks beside them."""
    format = format_with(None)
    text = data.draw(st.lists(st.sampled_from(SIGNS + WORDS), max_size=20).map("".join))
    told = run(parser(format), [text])
    joined = "".join(event.text for event in told if isinstance(event, TextDelta | ReasoningDelta))
    bare = text.replace("<think>", "").replace("</think>", "")
    assert "".join(bare.split()) == "".join(joined.replace("<think>", "").replace("</think>", "").split())
    if "<think>" not in text:
        assert told == ([TextDelta(text)] if text else [])


@settings(deadline=None, max_examples=300 * MORE)
@given(st.data())
def test_a_valid_call_is_always_whole_strict_and_of_a_given_tool(data: st.DataObject) -> None:
    format = data.draw(FORMATS)
    for call in ended(run(parser(format), data.draw(any_text(format)))):
        if isinstance(call, ToolCall):
            assert call.name in {tool.name for tool in TOOLS}
            json.dumps(call.arguments, allow_nan=False, ensure_ascii=False).encode()
        else:
            assert call.error


def readable(syntax: CallSyntax, call: ToolCall, tool: ToolSpec) -> bool:
    """Not every string can be written where strings are not escaped: see `Tagged` and `write_calls`."""
    tagged = syntax.arguments
    if not isinstance(tagged, Tagged) or tagged.json_strings:
        return True
    known = tool.parameters["properties"]
    for key, value in call.arguments.items():
        if isinstance(value, str) and (key in known or tagged.string_open != tagged.value_open):
            close = tagged.string_close + ("" if tagged.key_again is None else key + tagged.key_again)
            if (value + close).find(close) < len(value) or (key == "note" and value == "null"):
                return False
    return True


@pytest.mark.parametrize("name", SYNTAXES)
@settings(deadline=None, max_examples=40 * MORE)
@given(data=st.data())
def test_what_is_written_is_read(name: str, data: st.DataObject) -> None:
    """Any arguments: unicode, quotes, angle brackets, newlines, nested, empty; one call or several; cut anyhow."""
    syntax = SYNTAXES[name]
    known = {tool.name: tool for tool in TOOLS}
    most = 3 if syntax.separator is not None else 1
    some = st.builds(ToolCall, id=st.text(max_size=9), name=st.sampled_from(list(known)), arguments=ARGUMENTS)
    calls = data.draw(
        st.lists(some.filter(lambda call: readable(syntax, call, known[call.name])), min_size=1, max_size=most)
    )
    before = "" if syntax.only_at_start else data.draw(st.sampled_from(["", "\n", "Well. "]))
    text = before + write_calls(syntax, calls, TOOLS)
    events = run(parser(format_with(syntax)), cut(text, data.draw(st.lists(st.integers(0, 2000), max_size=8))))
    assert list(map(said, ended(events))) == list(map(said, calls))
    assert not any(isinstance(call, InvalidToolCall) for call in ended(events))
    assert text_of(events) == before.replace("\n", "")
    assert len({call.id for call in ended(events)}) == len(calls)


ODD_NAMES = [
    'a",b',
    'say "hi"',
    "get",
    "get_weather",
    "get_weather_2",
    "naïve",
    "a:0",
    "x>\n",
    "f(",
    "<fn>",
    "a b",
    "}",
]


@pytest.mark.parametrize("name", SYNTAXES)
def test_tools_may_be_named_as_they_like(name: str) -> None:
    """Also so that one name begins another, or that it has in it what ends a name."""
    syntax = SYNTAXES[name]
    tools = [ToolSpec(name=odd) for odd in ODD_NAMES]
    for tool in tools:
        text = write_calls(syntax, [ToolCall(id="a", name=tool.name, arguments={"x": 1})], tools)
        for pieces in ([text], list(text)):
            (call,) = ended(run(parser(format_with(syntax), tools=tools), pieces))
            assert said(call) == (tool.name, {"x": 1})
